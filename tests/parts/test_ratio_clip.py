"""PPO's clip: identities by enumeration, values and slopes by hand."""

import math
from dataclasses import replace

import pytest
import torch
from tabular import World, collected, stale, with_reference

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.discounted import Discounted
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.functional.surrogate import clipped_surrogate
from opd_lightning.objective import Objective
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.regularizer.imitation import Imitation
from opd_lightning.regularizer.ratio_clip import RatioClip
from opd_lightning.regularizer.reference_kl import ReferenceKL
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Linear
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Origin, TokenLoss

TOKEN = Token(reward=LogRatio())


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("estimator", [TOKEN, Discounted(reward=LogRatio(), gamma=1.0)])
@pytest.mark.parametrize("dual", [None, 3.0])
def test_at_ratio_1_the_gradient_is_the_plain_estimators(world, estimator, dual):
    experience = collected(world, world.theta.detach())
    plain = world.expected_gradient(estimator(world.scores, experience, 0.0))
    loss = estimator(world.scores, experience, 0.0)
    loss = RatioClip(dual=dual)(loss, world.scores, experience, 0.0)
    close(world.expected_gradient(loss), plain)
    close(loss.metrics["ratio"], world.mask.double())
    assert not loss.metrics["clip_fraction"].any()


def test_without_a_bound_it_is_the_importance_weighted_gradient(world):
    """Tokens of a stale student, weighted with u: at each of its prefixes the gradient of KL(S||T)."""
    table = stale(world)
    experience = collected(world, table)
    loss = TOKEN(world.scores, experience, 0.0)
    loss = RatioClip(clip_low=1.0, clip_high=1e9)(loss, world.scores, experience, 0.0)
    mu = (experience.collected_logp * world.mask).sum(-1).exp()
    got = world.gradient((mu.unsqueeze(-1) * world.mask * loss.weight * loss.value).sum())
    s, t = world.student_logp, world.teacher_logp
    per_prefix = (s.exp() * (s - t)).sum(-1)
    old = World(world.vocab, world.time, world.seed)
    old.theta = table
    want = world.gradient(sum(p * per_prefix[old.index[prefix]] for prefix, p in old.visits.items()))
    close(got, want)


# loss -min(u A, clip(u, 0.8, 1.2) A), its slope d loss / d log S(y), and whether a bound binds
TABLE = [
    (1.1, 2.0, -2.2, -2.2, False),  # inside
    (1.5, 2.0, -2.4, 0.0, True),  # went up as asked: -1.2 * 2
    (0.5, 2.0, -1.0, -1.0, False),  # went down against A: free to come back
    (0.5, -2.0, 1.6, 0.0, True),  # went down as asked: 0.8 * 2
    (1.5, -2.0, 3.0, 3.0, False),  # went up against A: free to come back
    (5.0, -2.0, 10.0, 10.0, False),  # the loss of such a token has no bound
    (5.0, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "value", "slope", "binds"), TABLE)
def test_values_and_slopes_by_hand(ratio, advantage, value, slope, binds):
    student = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = student.detach() - math.log(ratio)
    loss, u, bound = clipped_surrogate(
        student, old, torch.tensor([advantage], dtype=torch.float64), low=0.2, high=0.2
    )
    close(loss.detach(), torch.tensor([value], dtype=torch.float64))
    close(u, torch.tensor([ratio], dtype=torch.float64))
    close(torch.autograd.grad(loss.sum(), student)[0], torch.tensor([slope], dtype=torch.float64))
    assert bound.tolist() == [binds]


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "binds"),
    [*TABLE[:5], (2.9, -2.0, 5.8, 5.8, False), (5.0, -2.0, 6.0, 0.0, True), (5.0, 2.0, -2.4, 0.0, True)],
)
def test_the_dual_bounds_what_a_bad_token_can_lose(ratio, advantage, value, slope, binds):
    """At most -3 A where A < 0; nothing else changes."""
    student = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old, a = student.detach() - math.log(ratio), torch.tensor([advantage], dtype=torch.float64)
    a = a.requires_grad_()  # held fixed all the same
    loss, _, bound = clipped_surrogate(student, old, a, low=0.2, high=0.2, dual=3.0)
    close(loss.detach(), torch.tensor([value], dtype=torch.float64))
    slopes = torch.autograd.grad(loss.sum(), [student, a], allow_unused=True)
    close(slopes[0], torch.tensor([slope], dtype=torch.float64))
    assert slopes[1] is None
    assert bound.tolist() == [binds]


def test_an_infinite_ratio_is_finite():
    student = torch.tensor([0.0, -1e4], requires_grad=True)
    old, advantage = torch.tensor([-1e4, 0.0]), torch.tensor([-1.0, 1.0])
    loss, ratio, _ = clipped_surrogate(student, old, advantage, low=0.2, high=0.2)
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()
    assert loss.isfinite().all()
    assert ratio.isfinite().all()


def test_what_the_part_computes_is_the_surrogate_alone(world):
    """The value up to a constant without gradient, bounds of its own above and below, and both metrics."""
    experience = collected(world, stale(world))
    loss = TOKEN(world.scores, experience, 0.0)
    part = RatioClip(clip_low=0.1, clip_high=Linear(start=0.5, end=0.1), dual=3.0)
    got = part(loss, world.scores, experience, 0.5)
    want, ratio, binds = clipped_surrogate(
        world.scores.taken_logp, experience.collected_logp, loss.advantage, low=0.1, high=0.3, dual=3.0
    )
    close(world.expected_gradient(got), world.expected_gradient(replace(loss, value=want)))
    close(got.metrics["ratio"], ratio * world.mask)
    close(got.metrics["clip_fraction"], (binds & world.mask).double())
    assert 0 < got.metrics["clip_fraction"].sum() < world.mask.sum()


def test_the_dual_may_be_a_schedule(world):
    experience = collected(world, stale(world))
    moving = RatioClip(dual=Linear(start=3.0, end=1.4))
    for progress, dual in ((0.0, 3.0), (0.5, 2.2), (1.0, 1.4)):
        loss = TOKEN(world.scores, experience, progress)
        got = moving(loss, world.scores, experience, progress)
        close(got.value, RatioClip(dual=dual)(loss, world.scores, experience, progress).value)
    assert not got.value.equal(RatioClip(dual=3.0)(loss, world.scores, experience, 1.0).value)


@pytest.mark.parametrize("first", [True, False])
def test_the_clip_keeps_the_terms_of_others_in_any_order(world, first):
    experience = collected(world, stale(world))
    table = torch.ones_like(world.theta.detach()).cumsum(-1)
    clip, reference = RatioClip(), ReferenceKL(coefficient=0.4)
    gate = torch.arange(world.ids.numel()).view(world.ids.shape) % 3 / 2.0

    def gradient(parts):
        scores, referred = with_reference(world, table)
        here = replace(referred, collected_logp=experience.collected_logp)
        loss = TOKEN(scores, here, 0.0)
        loss = replace(loss, weight=loss.weight * gate)
        for part in parts:
            loss = part(loss, scores, here, 0.0)
        return world.expected_gradient(loss)

    # The term alone, and the gated clip alone: the loss of both is their sum.
    scores, referred = with_reference(world, table)
    zeros = torch.zeros(world.ids.shape, dtype=torch.float64)
    term = reference(TokenLoss(value=zeros, weight=zeros), scores, referred, 0.0)
    close(
        gradient([clip, reference] if first else [reference, clip]),
        gradient([clip]) + world.expected_gradient(term),
    )


def test_tokens_of_others_keep_their_value(world):
    experience = collected(world, stale(world))
    origin = world.rollout.origin.clone()
    origin[:, 0] = Origin.TEACHER
    experience = replace(experience, rollout=replace(world.rollout, origin=origin))
    loss = Imitation(coefficient=0.5)(TOKEN(world.scores, experience, 0.0), world.scores, experience, 0.0)
    clipped = RatioClip(clip_low=0.0, clip_high=0.0)(loss, world.scores, experience, 0.0)
    others = world.mask & (origin == Origin.TEACHER)
    assert torch.equal(clipped.value[others], loss.value[others])
    assert not clipped.metrics["ratio"][others].any()


@pytest.mark.parametrize("filler", [float("inf"), float("-inf"), float("nan")])
def test_what_stands_outside_never_matters(world, filler):
    def lost(fill):
        experience = collected(world, stale(world))
        loss = TOKEN(world.scores, experience, 0.0)
        experience = replace(
            experience,
            collected_logp=fill(experience.collected_logp),
        )
        loss = replace(loss, advantage=fill(loss.advantage))
        return RatioClip(dual=3.0)(
            loss, replace(world.scores, taken_logp=fill(world.scores.taken_logp)), experience, 0.0
        )

    clean, dirty = lost(lambda v: v), lost(lambda v: torch.where(world.mask, v, filler + world.theta.sum()))
    close((dirty.value * dirty.weight).detach(), (clean.value * clean.weight).detach(), atol=0)
    close(world.expected_gradient(dirty), world.expected_gradient(clean), atol=0)
    assert all(metric.isfinite().all() for metric in dirty.metrics.values())


@pytest.mark.parametrize("estimator", [TopK(divergence=ReverseKL())])
def test_a_ratio_clip_of_a_direct_estimator_is_refused(estimator):
    with pytest.raises(
        ConfigError, match=r"must have advantages for regularizer ratio_clip, got TopK.*token"
    ):
        Objective(
            estimator=estimator,
            support=TeacherTopK(k=4),
            reduction=TokenMean(),
            regularizers={"ratio_clip": RatioClip()},
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.2}, "clip_low` must be in \\[0, 1\\], got 1.2"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"clip_high": Linear(start=0.2, end=-0.2)}, "clip_high"),
        ({"dual": 1.2}, "dual` must be null or above 1.2"),
        ({"dual": Linear(start=3.0, end=1.1)}, "dual` must be null or above 1.2, got Linear"),
        ({"dual": 2.0, "clip_high": Linear(start=0.2, end=1.5)}, "dual` must be null or above 2.5"),
        ({"dual": 1.1}, "dual` must be null or above 1.2, got 1.1; use 3"),
    ],
)
def test_refused_clips(settings, message):
    with pytest.raises(ConfigError, match=message):
        RatioClip(**settings)
