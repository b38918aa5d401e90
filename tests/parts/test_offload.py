"""Weights that come for a use and go after it: when they move, what they say, and who may rely on them.

A CPU has one memory, so that the moves of these tests are real copies within it; ``gpu`` ones cross to a device.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from commands.own import save_model, shipped_tokenizer
from tiny import VOCAB, random_rollout, tiny_model

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.topk import TopK
from opd_lightning.loading import FrozenScorer, Loading, holding
from opd_lightning.objective import Objective
from opd_lightning.protocols import Follows, Rests
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.scorer import Scorer
from opd_lightning.scoring import ScoringPass
from opd_lightning.support.full import Full
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.teacher.cached import CachedScorer
from opd_lightning.teacher.local import LocalTeacher
from opd_lightning.teacher.offloaded import Offload, OffloadedScorer
from opd_lightning.teacher.routed import RoutedScorer, Routing
from opd_lightning.types import Sampling, Want
from opd_lightning.world import World
from opd_lightning.writing import writers_for

TOKENS = random_rollout(6).tokens
WANT = Want(taken=True, entropy=True, top=4, hidden=True)


class Moves:
    """Copies tensors and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.count += 1
        return tensor.to(device, copy=True)


def offloaded(moves=None, *, tied: bool = True, device: str = "cpu", head: bool = False) -> OffloadedScorer:
    scorer = Scorer(tiny_model(2, tied=tied).eval().requires_grad_(False))
    made = OffloadedScorer(scorer=scorer, weights=Offload(scorer, "cpu", moves))
    if head:
        made.keep_head()
    return made.to(device)


def plain(*, tied: bool = True) -> FrozenScorer:
    return FrozenScorer(Scorer(tiny_model(2, tied=tied).eval().requires_grad_(False)))


def tensors(scorer: Scorer) -> dict[str, torch.Tensor]:
    return dict([*scorer.named_parameters(remove_duplicate=False), *scorer.named_buffers()])


def same(one, other) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return all(torch.equal(a, b.to(a.device)) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def whole(tied: bool = True) -> int:
    """Tensors of the model, a tied one once."""
    scorer = plain(tied=tied).scorer
    return len({id(t) for t in tensors(scorer).values()})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_are_copied_for_a_score_and_dropped_after_it(tied):
    moves = Moves()
    teacher = offloaded(moves, tied=tied)
    resting = tensors(teacher.scorer)
    assert same(teacher(TOKENS, WANT), plain(tied=tied)(TOKENS, WANT))
    assert moves.count == whole(tied)
    with teacher.awake():
        now = tensors(teacher.scorer)
        assert all(now[name].data_ptr() != resting[name].data_ptr() for name in now)
        assert (teacher.scorer.head.weight is teacher.scorer.model.get_input_embeddings().weight) == tied
        assert not any(p.requires_grad for p in teacher.scorer.parameters())
    after = tensors(teacher.scorer)
    assert after.keys() == resting.keys()
    assert all(after[name] is resting[name] for name in after)
    assert moves.count == 2 * whole(tied)


def test_weights_come_once_for_a_block_and_not_before_they_are_used():
    moves = Moves()
    teacher = offloaded(moves)
    with holding(teacher):
        assert moves.count == 0
        for _ in range(3):
            teacher(TOKENS, WANT)
        with teacher.awake():
            pass
        assert moves.count == whole()
        held = tensors(teacher.scorer)
    assert all(t is not held[name] for name, t in tensors(teacher.scorer).items())


def test_weights_go_when_a_use_fails():
    teacher = offloaded(Moves())
    resting = tensors(teacher.scorer)

    def fails() -> None:
        with holding(teacher):
            teacher(TOKENS, WANT)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fails()
    assert all(t is resting[name] for name, t in tensors(teacher.scorer).items())


def test_nothing_is_copied_within_one_device():
    teacher = offloaded()
    resting = tensors(teacher.scorer)
    with teacher.awake():
        assert all(t is resting[name] for name, t in tensors(teacher.scorer).items())


def test_a_kept_head_stays_and_never_moves_again():
    """Of an untied head the weight alone; of a tied one it is the embedding too."""
    for tied in (True, False):
        moves = Moves()
        teacher = offloaded(moves, tied=tied, head=True)
        assert moves.count == 1
        head = teacher.scorer.head.weight
        teacher(TOKENS, WANT)
        assert teacher.scorer.head.weight is head
        assert moves.count == whole(tied)
        assert (teacher.scorer.model.get_input_embeddings().weight is head) == tied


@pytest.mark.parametrize("support", [Full(), TeacherTopK(k=4)], ids=lambda s: type(s).__name__)
def test_a_pass_over_many_groups_moves_once_and_gives_the_same_loss(support):
    estimator = TopK(divergence=ReverseKL(), form="renormalised")
    objective = Objective(estimator=estimator, support=support, reduction=TokenMean())
    rollout, losses, moves = random_rollout(6), [], Moves()
    for teacher in (plain(), offloaded(moves, head=objective.needs.full)):
        student = Scorer(tiny_model(3))
        student.set_target("teacher", teacher.scorer)
        with torch.no_grad():
            scoring = ScoringPass(teacher=teacher, reference=None, objective=objective, rows=2)
            experience = objective.finish(scoring(student, rollout), World())
        scores = student(rollout.tokens, objective.want, experience.support_ids, experience.hidden)
        loss = objective.loss(scores, experience, 0.0)[0]
        loss.backward()
        losses.append((loss.detach(), student.model.get_input_embeddings().weight.grad))
    assert moves.count == whole()
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))
    assert losses[0][1].abs().max() > 0


def test_a_cache_and_a_router_hold_what_is_behind_them(tmp_path):
    moves, other = Moves(), Moves()
    cache = CachedScorer(teacher=offloaded(moves), model="m", vocab=VOCAB, temperature=1.0, folder=tmp_path)
    teachers = {"a": cache, "b": offloaded(other)}
    router = RoutedScorer(
        teachers=teachers, routing=Routing(column="source", routes={}, names=("a", "b")), fields={"a": "a", "b": "b"}
    )  # fmt: skip
    assert isinstance(router, Rests)
    routed = RoutedScorer(**vars(router) | {"rows": (tuple(range(6)), ())})
    want = Want(taken=True)
    with holding(router):
        for rows in (slice(0, 2), slice(2, 4)):
            cache(TOKENS.rows(rows), want)
        routed(TOKENS, want)
    assert moves.count == whole()
    assert other.count == 0, "it has no row"
    with holding(router):
        routed(TOKENS, want)
    assert moves.count == whole(), "every row is on disk"


def test_a_teacher_that_writes_is_awake_for_it():
    moves, engine = Moves(), TransformersEngine(batch_size=8, method="auto")
    teacher, student = offloaded(moves), Scorer(tiny_model(3))
    prompts, sampling = random_rollout(3).prompt, Sampling(max_new_tokens=5)
    texts = []
    for each in (plain(), teacher):
        writers = writers_for(
            engine, student, each, shipped_tokenizer(), (0,), frozenset({"teacher", "mixed"})
        )
        texts.append(writers.teacher(prompts, sampling))
    assert moves.count == whole()
    assert torch.equal(texts[0].ids, texts[1].ids)
    writers.mixed(prompts, sampling, lambda s, t: t)
    assert moves.count == 2 * whole()


# -- as a setting


def loading(student: Scorer) -> Loading:
    tokenizer = shipped_tokenizer()
    return Loading(
        student=student,
        student_path="here",
        student_dtype="float32",
        tokenizer=tokenizer,
        vocab=len(tokenizer),
        scratch_mb=1,
    )


def test_the_setting(tmp_path):
    folder = str(save_model(tmp_path / "a"))
    student = Scorer(tiny_model(3, vocab=448))
    source = LocalTeacher(path=folder, dtype="float32", offload="cpu")
    teacher = source.load(loading(student))
    assert isinstance(teacher, OffloadedScorer)
    assert isinstance(teacher, Rests)
    assert not isinstance(teacher, Follows)
    assert source.gives_hidden
    wanted = LocalTeacher(path=folder, dtype="float32").load(loading(student))
    assert not isinstance(wanted, Rests)
    assert same(teacher.to("cpu")(TOKENS, WANT), wanted(TOKENS, WANT))
    stored = LocalTeacher(path=folder, dtype="float32", offload="cpu", cache=str(tmp_path / "c")).load(
        loading(student)
    )
    assert isinstance(stored.teacher, OffloadedScorer)
    with pytest.raises(ConfigError, match=r"`teacher\.offload` must be cpu or null"):
        LocalTeacher(path=folder, dtype="float32", offload="disk")


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_rest_in_pinned_memory_and_work_on_the_device(tied):
    teacher = offloaded(tied=tied, device="cuda", head=True)
    assert teacher.scorer.head.weight.is_cuda
    body = [p for p in teacher.scorer.parameters() if p is not teacher.scorer.head.weight]
    assert all(p.is_pinned() for p in body)
    scores = teacher(TOKENS.to("cuda"), WANT)
    assert same(scores, plain(tied=tied).to("cuda")(TOKENS.to("cuda"), WANT))
    assert all(not p.is_cuda for p in teacher.scorer.parameters() if p is not teacher.scorer.head.weight)
