"""Truncated importance weights by enumeration: numerics.md section 11, point 16."""

import math
from dataclasses import replace

import pytest
import torch
from tabular import World, collected, stale

from opd_lightning.errors import ConfigError
from opd_lightning.estimator.token import Token
from opd_lightning.regularizer.importance import Importance
from opd_lightning.regularizer.ratio_clip import RatioClip
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Linear
from opd_lightning.types import Origin, TokenLoss

TOKEN = Token(reward=LogRatio())


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def sampled_from(world, mu, of):
    """Experience of responses drawn from ``mu``, with the student's numbers where ``of`` reads them."""
    experience = collected(world, world.theta.detach() if of == "sampler" else stale(world, seed=9))
    rollout = replace(world.rollout, behavior_logp=world.taken(mu))
    return replace(experience, rollout=rollout)


def over(world, mu, loss):
    """The gradient of a loss whose responses ``mu`` drew."""
    probability = (world.taken(mu) * world.mask).sum(-1).exp().unsqueeze(-1)
    return world.gradient((probability * world.mask * loss.weight * loss.value).sum())


@pytest.mark.parametrize("of", ["sampler", "policy"])
@pytest.mark.parametrize("vocab", [3, 6])
def test_weights_reproduce_the_students_expectation(vocab, of):  # numerics 11.16
    """At one prefix: drawn from mu and weighted with S/mu, the gradient is that of draws from S."""
    world = World(vocab, 1)
    mu = stale(world, size=1.0).log_softmax(-1)
    experience = sampled_from(world, mu, of)
    loss = Importance(cap=math.inf, of=of)(
        TOKEN(world.scores, experience, 0.0), world.scores, experience, 0.0
    )
    s, t = world.student_logp, world.teacher_logp
    exact = world.gradient((s.exp() * (s - t)).sum())
    close(over(world, mu, loss), exact)
    plain = over(world, mu, TOKEN(world.scores, experience, 0.0))
    assert (plain - exact).abs().max() > 1e-3  # without the weight it is another gradient


@pytest.mark.parametrize("of", ["sampler", "policy"])
def test_weights_over_responses_correct_each_prefix_but_not_which_ones_are_met(world, of):  # numerics 11.16
    mu_world = World(world.vocab, world.time, world.seed)
    mu_world.theta = stale(world, size=1.0)
    mu = mu_world.theta.log_softmax(-1)
    experience = sampled_from(world, mu, of)
    loss = Importance(cap=math.inf, of=of)(
        TOKEN(world.scores, experience, 0.0), world.scores, experience, 0.0
    )
    s, t = world.student_logp, world.teacher_logp
    per_prefix = (s.exp() * (s - t)).sum(-1)
    at_mu = sum(p * per_prefix[world.index[prefix]] for prefix, p in mu_world.visits.items())
    close(over(world, mu, loss), world.gradient(at_mu))


def weights(part, ratios, progress=0.0):
    """The weights of tokens with these ratios, in one row, behind an earlier weight of 1/2."""
    world = World(len(ratios), 1)
    experience = world.experience
    behavior = torch.full(world.ids.shape, -1.0, dtype=torch.float64)
    logp = behavior + torch.tensor(ratios, dtype=torch.float64).log().unsqueeze(-1)
    experience = replace(
        experience, collected_logp=logp, rollout=replace(experience.rollout, behavior_logp=behavior)
    )
    loss = TokenLoss(value=torch.ones_like(logp), weight=torch.full_like(logp, 0.5))
    loss = part(loss, world.scores, experience, progress)
    cut = loss.metrics["importance_cut"].flatten().tolist()
    close(loss.metrics["importance"], 2.0 * loss.weight)
    return loss.weight.flatten().tolist(), cut


RATIOS = [0.1, 0.5, 1.0, 1.9, 4.0]


def test_the_cap_cuts_only_what_is_above():  # numerics 11.16
    got, cut = weights(Importance(cap=2.0), RATIOS)
    assert got == pytest.approx([0.05, 0.25, 0.5, 0.95, 1.0])
    assert cut == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_the_band_leaves_out_what_is_outside():  # numerics 11.16
    got, cut = weights(Importance(cap=math.inf, band=[0.4, 2.0]), RATIOS)
    assert got == pytest.approx([0.0, 0.25, 0.5, 0.95, 0.0])
    assert cut == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_band_is_of_the_ratio_and_not_of_the_capped_weight():
    got, _ = weights(Importance(cap=0.75, band=[0.4, 2.0]), RATIOS)
    assert got == pytest.approx([0.0, 0.25, 0.375, 0.375, 0.0])


def test_the_band_may_be_of_schedules():
    band = [Linear(start=0.0, end=0.8), Linear(start=5.0, end=1.5)]
    assert weights(Importance(cap=math.inf, band=band), RATIOS)[1] == [0.0] * 5
    got, cut = weights(Importance(cap=math.inf, band=band), RATIOS, progress=1.0)
    assert got == pytest.approx([0.0, 0.0, 0.5, 0.0, 0.0])
    assert cut == [1.0, 1.0, 0.0, 1.0, 1.0]


def test_the_cap_may_be_a_schedule():
    got, _ = weights(Importance(cap=Linear(start=4.0, end=1.0)), RATIOS, progress=1.0)
    assert got == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5])


def test_weights_have_no_gradient_and_leave_other_tokens_alone(world):
    experience = sampled_from(world, stale(world).log_softmax(-1), "policy")
    origin = world.rollout.origin.clone()
    origin[:, 0] = Origin.DATA
    experience = replace(experience, rollout=replace(experience.rollout, origin=origin))
    loss = TokenLoss(value=world.scores.taken_logp, weight=world.mask.double() * 0.5)
    loss = Importance(cap=0.5, of="policy")(loss, world.scores, experience, 0.0)
    assert not loss.weight.requires_grad
    assert (loss.weight[:, 0] == 0.5).all()


@pytest.mark.parametrize("first", [True, False])
def test_clip_and_weights_commute(world, first):
    """The clip's loss carries the weight, whichever comes first."""
    mu = stale(world).log_softmax(-1)
    experience = sampled_from(world, mu, "policy")
    parts = [Importance(cap=2.0, of="policy"), RatioClip()]

    def lost(parts):
        loss = TOKEN(world.scores, experience, 0.0)
        for part in parts:
            loss = part(loss, world.scores, experience, 0.0)
        return over(world, mu, loss)

    close(lost(parts if first else parts[::-1]), lost(parts))


@pytest.mark.parametrize("filler", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("part", [Importance(cap=2.0), Importance(cap=2.0, of="policy")])
def test_what_stands_outside_never_matters(world, part, filler):
    def lost(fill):
        experience = collected(world, stale(world))
        loss = TOKEN(world.scores, experience, 0.0)
        experience = replace(
            experience,
            collected_logp=fill(experience.collected_logp),
            rollout=replace(experience.rollout, behavior_logp=fill(experience.collected_logp)),
        )
        loss = replace(loss, advantage=fill(loss.advantage))
        return part(loss, replace(world.scores, taken_logp=fill(world.scores.taken_logp)), experience, 0.0)

    clean, dirty = lost(lambda v: v), lost(lambda v: torch.where(world.mask, v, filler + world.theta.sum()))
    close((dirty.value * dirty.weight).detach(), (clean.value * clean.weight).detach(), atol=0)
    close(world.expected_gradient(dirty), world.expected_gradient(clean), atol=0)
    assert all(metric.isfinite().all() for metric in dirty.metrics.values())


def test_what_importance_asks_for():
    assert Importance(cap=2.0).needs.collected_logp
    assert not Importance(cap=2.0).want.taken
    assert Importance(cap=2.0, of="policy").want.taken
    assert not Importance(cap=2.0, of="policy").needs.collected_logp


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cap": 0.0}, "cap` must be above 0, got 0.0; use 2"),
        ({"of": "mu"}, "of` must be sampler or policy"),
        ({"band": [2.0, 0.5]}, "band` must be \\[low, high\\]"),
        ({"band": [Linear(start=0.5, end=2.0), 1.0]}, "band` must be .* at all times"),
        ({"band": [Linear(start=-0.5, end=2.0), 3.0]}, "band"),
        ({"band": [0.5]}, "band"),
        ({"band": "ab"}, "band"),
        ({"band": 3.0}, "band"),
    ],
)
def test_refused_weights(settings, message):
    with pytest.raises(ConfigError, match=message):
        Importance(**({"cap": 2.0} | settings))
