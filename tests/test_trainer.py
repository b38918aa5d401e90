"""Both halves of a run under a real trainer: what an optimizer step is, and which weights wrote what."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from tiny import tiny_model

from opd_lightning.collector import Collector
from opd_lightning.data import OnPolicyData
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.estimator.discounted import Discounted
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.evaluation import Evaluation
from opd_lightning.models import load_tokenizer
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import Objective
from opd_lightning.optim import WarmupDecay
from opd_lightning.prompts import Prompts
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.scorer import Scorer
from opd_lightning.support.full import Full
from opd_lightning.support.none import NoSupport
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.task.word_problems import WordProblems
from opd_lightning.teacher.local import FrozenScorer
from opd_lightning.types import Experience, Want

TOKENIZER = load_tokenizer("builtin:word_problems/student", "student.path")
TASK = WordProblems(min_steps=1, max_steps=2, train_size=64, validation_size=6)
WIDTH = 448
STOPS = tuple(range(0, WIDTH, 5))  # about every fifth token ends its response
EXACT = Objective(
    estimator=TopK(divergence=ReverseKL(), form="renormalised"), support=Full(), reduction=TokenMean()
)
MATCHING = replace(EXACT, support=TeacherTopK(k=4))
SAMPLED = Objective(estimator=Token(reward=LogRatio()), support=NoSupport(), reduction=TokenMean())


class Toy:
    """A run of two tiny random models on word problems; responses of at most ``new`` tokens."""

    def __init__(
        self,
        objective: Objective = MATCHING,
        *,
        vocab: int = WIDTH,
        new: int = 6,
        dtype: torch.dtype = torch.float32,
        prompts: int = 4,
        samples: int = 2,
        steps_per_collection: int = 1,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        scheduler=None,
        method: str = "auto",
        stops: tuple[int, ...] = STOPS,
    ) -> None:
        self.student = Scorer(tiny_model(1, vocab=WIDTH).to(dtype), vocab).train()
        self.teacher = FrozenScorer(
            Scorer(tiny_model(2, vocab=WIDTH).to(dtype), vocab).eval().requires_grad_(False)
        )
        self.student.set_target("teacher", self.teacher.scorer)
        collector = Collector(
            task=TASK,
            prompts=self.prompts("train"),
            engine=TransformersEngine(batch_size=64, method=method),
            rollout=StudentRollout(
                samples=samples,
                max_new_tokens=new,
                loss_horizon=None,
                early_stop=False,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
            ),
            teacher=self.teacher,
            objective=objective,
            tokenizer=TOKENIZER,
            stop_ids=stops,
            prompts_per_collection=prompts,
            steps_per_collection=steps_per_collection,
            score_rows=8,
            probe_rows=4,
        )
        evaluation = Evaluation(
            problems=None,
            max_new_tokens=new,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            samples=1,
            batch=4,
        )
        self.data = OnPolicyData(collector, self.prompts("validation"), evaluation)
        self.module = OnPolicyDistillation(self.student, objective, optimizer, scheduler)

    @staticmethod
    def prompts(split: str) -> Prompts:
        return Prompts(
            problems=TASK.problems(split), tokenizer=TOKENIZER, max_tokens=512, long="drop", seed=0
        )

    def fit(self, steps: int, *callbacks: L.Callback, accumulate: int = 1, **more) -> L.Trainer:
        settings = {
            "max_steps": steps,
            "accumulate_grad_batches": accumulate,
            "callbacks": list(callbacks),
            "accelerator": "cpu",
            "devices": 1,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
        }
        trainer = L.Trainer(**settings | more)
        trainer.fit(self.module, datamodule=self.data)
        return trainer

    def weights(self) -> torch.Tensor:
        return flat(self.student)


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


class Watch(L.Callback):
    """Writes down every micro-batch as training sees it, and what was logged of each optimizer step."""

    def __init__(self) -> None:
        self.batches: list[Experience] = []
        self.done: list[int] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(batch)
        self.done.append(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > len(self.logged):
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


# -- what an optimizer step is


# numerics 11.23
@pytest.mark.parametrize("objective", [MATCHING, SAMPLED], ids=["topk", "token"])
def test_accumulation_changes_nothing(objective):
    """A step of eight rows in 1, 3, 5 or 9 micro-batches, of which some of the 9 are empty."""
    found = {}
    for accumulate in (1, 3, 5, 9):
        toy = Toy(objective, dtype=torch.float64, steps_per_collection=2, prompts=8)
        before, watch = toy.weights(), Watch()
        toy.fit(4, watch, accumulate=accumulate, gradient_clip_val=0.1)
        found[accumulate] = toy.weights() - before
        assert len(watch.batches) == 4 * accumulate
        assert any(float(b.share.sum()) == 0 for b in watch.batches) == (accumulate == 9)
        assert all(step["train/grad_norm"] > 0.1 for step in watch.logged)  # clipping is at work
    assert found[1].norm() > 0.1
    for accumulate in (3, 5, 9):
        assert (found[accumulate] - found[1]).norm() <= 1e-12 * found[1].norm()


# numerics 11.23
def test_accumulation_in_single_precision():
    found = []
    for accumulate in (1, 3, 4):
        toy = Toy(prompts=8, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
        before = toy.weights()
        toy.fit(4, accumulate=accumulate)
        found.append(toy.weights())
    assert (found[0] - before).norm() > 1e-3 * before.norm()
    for other in found[1:]:
        assert (other - found[0]).norm() <= 2e-7 * found[0].norm()


def test_global_step_counts_optimizer_steps():
    toy, watch = Toy(scheduler=WarmupDecay(warmup_steps=2, final=0.1, shape="linear")), Watch()
    trainer = toy.fit(5, watch, accumulate=3)
    assert trainer.global_step == 5
    assert watch.done == [step for step in range(5) for _ in range(3)]
    (optimizer,) = trainer.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {5}
    # Two steps of warm-up, then a line from 1 down to 0.1 that would end at step 5.
    rates = [step["train/lr"] for step in watch.logged]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.007, 0.004])


# numerics 11.23
def test_logged_loss_is_the_mean_over_the_tokens_of_the_step():
    """KL(S||T), both renormalised over the teacher's four ids, by the models' own logits, token by token."""
    toy = Toy(prompts=6)
    expected: list[float] = []

    class ByHand(Watch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx % 3 == 0:
                self.terms: list[float] = []
            for row in range(len(batch.share)):
                if float(batch.share[row].sum()) > 0:
                    self.terms += divergences(toy, batch, row)
            if batch_idx % 3 == 2:
                expected.append(sum(self.terms) / len(self.terms))

    watch = ByHand()
    toy.fit(3, watch, accumulate=3)
    assert expected[0] > 0.01
    assert [step["train/loss"] for step in watch.logged] == pytest.approx(expected, rel=1e-4)
    assert any(not b.rollout.mask.all() for b in watch.batches)  # ragged
    tokens = [sum(int(b.rollout.mask.sum()) for b in watch.batches[i : i + 3]) for i in (0, 3, 6)]
    assert [step["train/tokens"] for step in watch.logged] == tokens


@torch.no_grad()
def divergences(toy: Toy, batch: Experience, row: int) -> list[float]:
    """Return the divergence at every token of a response, from an unpadded forward of each model."""
    rollout = batch.rollout
    prompt = rollout.prompt.ids[row][rollout.prompt.mask[row]]
    response = rollout.ids[row][rollout.mask[row]]
    ids = torch.cat([prompt, response])[None]
    start = len(prompt) - 1
    student, teacher = (
        s.model(input_ids=ids).logits[0, start:-1].double() for s in (toy.student, toy.teacher.scorer)
    )
    chosen = teacher.topk(4, -1).indices
    s, t = (logits.gather(-1, chosen).softmax(-1) for logits in (student, teacher))
    return (s * (s / t).log()).sum(-1).tolist()


# -- which weights wrote what


def test_collections_and_their_clock():
    """Five steps, two on each collection: the third collection is used by half."""
    toy, watch = Toy(steps_per_collection=2), Watch()
    toy.fit(5, watch, accumulate=2)
    assert len(watch.batches) == 10
    assert [b.rollout.version for b in watch.batches] == [0] * 4 + [2] * 4 + [4] * 2
    assert [b.progress for b in watch.batches] == pytest.approx([0.0] * 4 + [0.4] * 4 + [0.8] * 2)
    prompts = [
        {p.index for b in watch.batches[i : i + 2] for p in b.rollout.prompt.problems}
        for i in range(0, 10, 2)
    ]
    assert all(len(seen) == 2 for seen in prompts)  # 4 prompts a collection, 2 a step
    assert all(not a & b for a, b in itertools.combinations(prompts, 2))


def test_responses_come_from_the_current_weights():
    """At temperature 1 the sampler's log-probs are those of the weights that wrote; a batch ahead would be older."""
    toy = Toy(steps_per_collection=2, prompts=8, optimizer=partial(torch.optim.SGD, lr=0.5))
    gaps: list[float] = []

    class Compare(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            rollout = batch.rollout
            with torch.no_grad():
                now = toy.student(rollout.tokens, Want(taken=True)).taken_logp
            gaps.append(float((now - rollout.behavior_logp)[rollout.mask].abs().max()))

    toy.fit(6, Compare())
    assert max(gaps[0::2]) < 1e-4
    assert min(gaps[1::2]) > 1e-2  # one optimizer step later the weights have moved on


def test_the_student_learns_in_train_mode_and_writes_in_eval_mode():
    toy = Toy(steps_per_collection=2, method="generate")
    seen: list[tuple[bool, bool]] = []

    def hook(module, args) -> None:
        modes = {m.training for m in toy.student.modules()}
        assert len(modes) == 1
        seen.append((modes.pop(), torch.is_grad_enabled()))

    toy.student.model.base_model.register_forward_pre_hook(hook)
    toy.fit(4, limit_val_batches=1, val_check_interval=1)
    assert set(seen) == {(True, True), (False, False)}
    assert seen.count((True, True)) == 4  # one forward a micro-batch, also after an evaluation
    assert toy.student.training


def test_evaluation_does_not_touch_training():
    found = []
    for evaluation in ({}, {"limit_val_batches": 1.0, "val_check_interval": 3}):
        toy, watch = Toy(steps_per_collection=2), Watch()
        toy.fit(4, watch, accumulate=2, **evaluation)
        found.append((toy.weights(), [step["train/loss"] for step in watch.logged]))
    assert "eval/length_sampled" in watch.logged[-1]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


# -- the teacher


# numerics 11.31
@pytest.mark.parametrize("objective", [MATCHING, EXACT, SAMPLED], ids=["topk", "full", "token"])
def test_the_teacher_is_read_and_nothing_else(objective, tmp_path):
    toy = Toy(objective)
    before = flat(toy.teacher.scorer)
    trainer = toy.fit(2)
    teacher = dict(toy.teacher.scorer.named_parameters())
    assert torch.equal(flat(toy.teacher.scorer), before)
    assert all(p.grad is None and not p.requires_grad for p in teacher.values())

    (optimizer,) = trainer.optimizers
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in toy.student.parameters()}
    assert {id(p) for p in toy.module.parameters()} == trained

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["state_dict"].keys() == {f"student.{name}" for name in toy.student.state_dict()}
    for tensor in tensors(saved):
        assert not any(
            tensor.shape == p.shape and torch.equal(tensor, p) for p in teacher.values() if p.std() > 0
        )


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


# -- learning


@pytest.mark.parametrize(
    ("objective", "left"),
    [
        (EXACT, 0.4),
        (replace(MATCHING, support=TeacherTopK(k=6)), 0.5),
        (SAMPLED, 0.5),
        (replace(SAMPLED, estimator=Discounted(reward=LogRatio(), gamma=1.0)), 0.7),
    ],
    ids=["full", "teacher", "token", "rewards-to-go"],
)
def test_training_reduces_the_exact_divergence(objective, left):
    """numerics 11.31: 8 ids, up to 3 tokens, KL(S||T) over all responses by enumeration."""
    toy = Toy(objective, vocab=8, new=3, prompts=4, samples=8, stops=(2,))
    prompts = [toy.data.collector.prompts.stream([i]).ids for i in range(2)]
    before = sum(sequence_divergence(toy, p) for p in prompts)
    toy.fit(20)
    after = sum(sequence_divergence(toy, p) for p in prompts)
    assert before > 1.0
    assert after < left * before


@torch.no_grad()
def sequence_divergence(toy: Toy, prompt: torch.Tensor) -> float:
    """Return KL(S(.|x) || T(.|x)) over responses: every living prefix's divergence times its probability."""
    prefixes, weight, total = prompt, torch.ones(1), 0.0
    for _ in range(3):
        student, teacher = (
            s.model(input_ids=prefixes).logits[:, -1, : s.vocab].log_softmax(-1)
            for s in (toy.student, toy.teacher.scorer)
        )
        total += float((weight * (student.exp() * (student - teacher)).sum(-1)).sum())
        ids = torch.tensor([i for i in range(toy.student.vocab) if i not in toy.data.collector.stop_ids])
        weight = (weight[:, None] * student[:, ids].exp()).flatten()
        prefixes = torch.cat(
            [prefixes.repeat_interleave(len(ids), 0), ids.repeat(len(prefixes))[:, None]], -1
        )
    return total
