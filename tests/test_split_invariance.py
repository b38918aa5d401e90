"""The same rollouts cut into any micro-batches and padded anyhow give the same loss and gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import random_experience, tiny_model

from opd_lightning.buffer import empty, micro_batches
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.sequence import Sequence
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.objective import Objective
from opd_lightning.reduction.sequence_mean import SequenceMean
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.scorer import Scorer
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Experience, TensorValue
from opd_lightning.world import World as Processes

ROWS = 11
ESTIMATORS = {
    "token": Token(reward=LogRatio()),
    "sequence": Sequence(reward=LogRatio()),
    "topk renormalised": TopK(divergence=ReverseKL(), form="renormalised"),
    "topk tail": TopK(divergence=ReverseKL(), form="tail"),
}
REDUCTIONS = {"token_mean": TokenMean(), "sequence_mean": SequenceMean()}


def gradient(objective: Objective, parts: list[Experience]) -> tuple[float, torch.Tensor]:
    """Return the summed loss of the micro-batches and the flat gradient of a fresh student."""
    student = Scorer(tiny_model())
    loss = 0.0
    for part in parts:
        scores = student(part.rollout.tokens, objective.want, part.support_ids)
        value, _ = objective.loss(scores, part, 0.0)
        value.backward()
        loss += float(value.detach())
    return loss, torch.cat([p.grad.flatten() for p in student.parameters()])


def whole(objective: Objective) -> Experience:
    experience = random_experience(ROWS)
    return objective.finish(experience, Processes())


@pytest.fixture(params=[(e, r) for e in ESTIMATORS for r in REDUCTIONS], ids=lambda p: f"{p[0]}-{p[1]}")
def objective(request) -> Objective:
    estimator, reduction = request.param
    return Objective(
        estimator=ESTIMATORS[estimator], support=TeacherTopK(k=4), reduction=REDUCTIONS[reduction]
    )


# numerics 11.23
def test_micro_batches_give_the_loss_and_gradient_of_the_whole(objective):
    experience = whole(objective)
    expected, reference = gradient(objective, [experience])
    assert abs(expected) > 1e-3
    for count in (1, 2, 3, 5, ROWS, ROWS + 4):
        parts = micro_batches(experience, count)
        assert len(parts) == count
        assert sum(int((part.share > 0).sum()) for part in parts) == int((experience.share > 0).sum())
        loss, found = gradient(objective, parts)
        assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert (found - reference).abs().max() <= 1e-6 * reference.abs().max()


# numerics 11.23
def test_padding_changes_nothing(objective):
    experience = whole(objective)
    expected, reference = gradient(objective, [experience])
    loss, found = gradient(objective, [padded(experience, prompt=3, time=5)])
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (found - reference).abs().max() <= 1e-6 * reference.abs().max()


# numerics 11.23
def test_two_ranks_add_up_to_one_process(objective):
    experience = random_experience(ROWS)
    halves = [experience.rows(slice(0, 4)), experience.rows(slice(4, ROWS))]
    # Each rank's reduction asks for its totals in the same order: record both, then answer with the sums.
    asked: list[list[torch.Tensor]] = [[], []]
    for rank, half in enumerate(halves):
        objective.finish(half, Processes(total=lambda t, rank=rank: (asked[rank].append(t.clone()), t)[1]))
    answers = [a + b for a, b in zip(*asked, strict=True)]
    parts = []
    for half in halves:
        left = iter(answers)
        parts.append(objective.finish(half, Processes(total=lambda t, left=left: next(left))))
    expected, reference = gradient(objective, [whole(objective)])
    loss, found = gradient(objective, parts)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (found - reference).abs().max() <= 1e-6 * reference.abs().max()


def shared_out(objective: Objective, parts: list[Experience]) -> list[Experience]:
    """Return each rank's rows with the shares that the ranks agree on, as a reduction over processes would."""
    asked: list[list[torch.Tensor]] = [[] for _ in parts]
    for rank, part in enumerate(parts):
        objective.finish(part, Processes(total=lambda t, rank=rank: (asked[rank].append(t.clone()), t)[1]))
    answers = [torch.stack(values).sum(0) for values in zip(*asked, strict=True)]
    done = []
    for part in parts:
        left = iter(answers)
        done.append(objective.finish(part, Processes(total=lambda t, left=left: next(left))))
    return done


# numerics 11.23
@pytest.mark.parametrize("rows", [ROWS, 3], ids=["full window", "ragged last window"])
@pytest.mark.parametrize("accumulate", [1, 2, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_world_accumulation_and_a_ragged_window_together(objective, world, accumulate, rows):
    """As a trainer does it: a mean over the ranks of sums over micro-batches that were divided by their number.

    Three rows for three ranks of five micro-batches leave most of them empty; ranks have unequal shares.
    """
    experience = random_experience(ROWS).rows(slice(0, rows))
    expected, reference = gradient(objective, [objective.finish(experience, Processes())])
    cuts = [0, *[1 + (rows - 1) * rank // world for rank in range(1, world)], rows]
    shares = shared_out(objective, [experience.rows(slice(a, b)) for a, b in pairwise(cuts)])
    losses, gradients = [], []
    for share in shares:
        loss, found = gradient(objective, micro_batches(share, accumulate))
        # The module multiplies by both, and Lightning divides by them again.
        losses.append(loss * accumulate * world / accumulate)
        gradients.append(found * (accumulate * world) / accumulate)
    assert sum(losses) / world == pytest.approx(expected, rel=1e-6, abs=1e-7)
    mean = torch.stack(gradients).mean(0)
    assert (mean - reference).norm() <= 1e-6 * reference.norm() > 0


# numerics 11.23, 11.24
def test_an_empty_micro_batch_is_zero_with_a_graph(objective):
    experience = whole(objective)
    loss, found = gradient(objective, [empty(experience)])
    assert loss == 0.0
    assert found.abs().max() == 0.0


def test_micro_batches_balance_tokens():
    experience = random_experience(64, time=40)
    counts = [
        int(part.rollout.mask.sum() + part.rollout.prompt.mask.sum()) for part in micro_batches(experience, 4)
    ]
    assert max(counts) - min(counts) <= 47  # no more than one row, prompt 7 and response 40


def test_no_micro_batch_is_empty_while_there_are_rows():
    experience = random_experience(4, time=40)
    lengths = torch.tensor([1, 1, 1, 40])
    mask = torch.arange(40) < lengths.unsqueeze(-1)
    rollout = replace(experience.rollout, mask=mask, ids=experience.rollout.ids * mask)
    parts = micro_batches(replace(experience, rollout=rollout, share=mask / mask.sum()), 4)
    assert [int((part.share > 0).sum()) for part in parts] == [1, 1, 1, 40]


def test_count_is_refused_below_one():
    with pytest.raises(ConfigError, match="accumulate_grad_batches"):
        micro_batches(random_experience(2), 0)


def padded(value: TensorValue, *, prompt: int, time: int) -> Experience:
    """Return the experience with more padding, left of the prompts and right of the responses."""

    def pad(tensor: torch.Tensor, left: int, right: int) -> torch.Tensor:
        shape = list(tensor.shape)
        parts = [torch.zeros([shape[0], n, *shape[2:]], dtype=tensor.dtype) for n in (left, right)]
        return torch.cat([parts[0], tensor, parts[1]], 1)

    assert isinstance(value, Experience)
    rollout = value.rollout
    batch = replace(
        rollout.prompt, ids=pad(rollout.prompt.ids, prompt, 0), mask=pad(rollout.prompt.mask, prompt, 0)
    )
    names = ("ids", "mask", "origin", "horizon", "behavior_logp")
    wider = replace(rollout, prompt=batch, **{n: pad(getattr(rollout, n), 0, time) for n in names})
    fields = ("share", "teacher_taken_logp", "support_ids", "support_valid", "support_teacher_logp")
    return replace(value, rollout=wider, **{n: pad(getattr(value, n), 0, time) for n in fields})
