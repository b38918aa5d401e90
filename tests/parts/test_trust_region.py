"""The trust region against its formulas, by enumeration of all responses."""

import math
from dataclasses import replace

import pytest
import torch
from gated import (
    applied,
    close,
    collected,
    same,
    scored,
    tables,
    top,
    with_scores,
)
from tabular import World

from opd_lightning.errors import ConfigError
from opd_lightning.functional.divergence import forward_kl
from opd_lightning.regularizer._outliers import add_forward_kl
from opd_lightning.regularizer.trust_region import TrustRegion
from opd_lightning.types import TokenLoss
from opd_lightning.world import World as Processes


def trust_ascent(s, t):
    return with_scores(torch.minimum(s, t) * (t / s).log(), s)


# -- expected gradients


def test_trust_term_alone(world):
    """numerics 11.11: sum_v min(S, T) log(T/S) grad log S(v) at every prefix."""
    loss = applied(TrustRegion(outlier="mask", gate="expected"), *scored(world))
    s, t, _, visits = tables(world)
    close(world.expected_gradient(loss), -visits * trust_ascent(s, t))


@pytest.mark.parametrize("renormalised", [False, True])
def test_outlier_differentiated_directly(world, renormalised):
    """numerics 11.11: TV (T on the support - P_T S), over P_T where the teacher is renormalised."""
    part = TrustRegion(gate="expected", teacher_renormalised=renormalised, coefficient=0.7)
    s, t, _, visits = tables(world)
    distance = 0.5 * (s - t).abs().sum(-1, keepdim=True)
    on = t * top(t, 2)
    mass = on.sum(-1, keepdim=True)
    outlier = distance * (on - mass * s) / (mass if renormalised else 1.0)
    ascent = trust_ascent(s, t) + 0.7 * outlier
    close(world.expected_gradient(applied(part, *scored(world))), -visits * ascent)


@pytest.mark.parametrize("renormalised", [False, True])
def test_outlier_as_detached_scalar(world, renormalised):
    """numerics 11.11: c E[(1 - M) grad log S(y)] with c = -FKL on the support."""
    part = TrustRegion(gate="expected", gradient="scalar", teacher_renormalised=renormalised, coefficient=0.7)
    s, t, accept, visits = tables(world)
    on = t * top(t, 2)
    target = on / on.sum(-1, keepdim=True) if renormalised else on
    divergence = torch.where(on > 0, target * (target / s).log(), 0.0).sum(-1, keepdim=True)
    ascent = trust_ascent(s, t) - 0.7 * divergence * with_scores((1 - accept) * s, s)
    close(world.expected_gradient(applied(part, *scored(world))), -visits * ascent)


def test_outlier_over_the_whole_vocabulary(world):
    """numerics 11.11: with the full term the outlier's ascent is TV (T - S), renormalised or not."""
    s, t, _, visits = tables(world)
    ascent = trust_ascent(s, t) + 0.5 * (s - t).abs().sum(-1, keepdim=True) * (t - s)
    for renormalised in (False, True):
        scores, experience = world.on_everything(forward_kl)
        part = TrustRegion(gate="expected", teacher_renormalised=renormalised)
        loss = applied(part, scores, collected(world, experience))
        close(world.expected_gradient(loss), -visits * ascent)


def test_a_number_of_the_position_as_advantage_teaches_nothing(world):
    """numerics 11.8: rejecting every token leaves the scalar form an expected gradient of 0; it is refused."""
    scores, experience = scored(world)
    nothing = TokenLoss(value=torch.zeros_like(scores.taken_logp), weight=torch.zeros_like(scores.taken_logp))
    everywhere = world.mask.to(torch.float64)
    options = {"coefficient": 1.0, "renormalised": False}
    loss = add_forward_kl(nothing, scores, experience, everywhere, scalar=True, **options)
    assert loss.value.abs().max() > 0.1
    close(world.expected_gradient(loss), torch.zeros_like(world.theta))
    direct = add_forward_kl(nothing, scores, experience, everywhere, scalar=False, **options)
    assert world.expected_gradient(direct).abs().max() > 1e-2
    with pytest.raises(ConfigError, match="expected gradient of exactly 0"):
        TrustRegion(gate="threshold", gradient="scalar", threshold=math.inf)


# -- the gate


def test_mean_rejection_is_the_total_variation(world):
    """numerics 11.10: E[1 - M] = TV, for the metric exactly."""
    loss = applied(TrustRegion(outlier="mask", gate="expected"), *scored(world))
    s, t, _, visits = tables(world)
    share = world.probability.detach().unsqueeze(-1) * world.mask
    variation = (visits * 0.5 * (s - t).abs()).sum()
    close((share * loss.metrics["rejection"]).sum(), variation)
    close((share * (1 - loss.metrics["accept"])).sum(), variation)


def test_draws_have_the_probability_of_acceptance():
    """numerics 11.10: many draws at one prefix; frequencies within 4.5 standard errors."""
    world, copies = World(5, 1), 4000
    _, experience = scored(world)
    rows = torch.arange(len(world.ids)).repeat_interleave(copies)
    many = experience.rows(rows)
    prompt = replace(many.rollout.prompt, seeds=tuple(range(len(rows))))
    many = replace(many, rollout=replace(many.rollout, prompt=prompt))
    part = TrustRegion(outlier="mask")
    many = replace(many, extras=part.prepare(many, Processes()))
    taken = torch.zeros(rows.shape[0], 1, dtype=torch.float64)
    loss = part(TokenLoss(value=taken, weight=taken + 1), replace(world.scores, taken_logp=taken), many, 0.0)
    frequency = loss.metrics["accept"].reshape(len(world.ids), copies).mean(-1)
    s, t, accept, _ = (table[0] for table in tables(world))
    accept, s, t = (table[world.ids[:, 0]] for table in (accept, s, t))
    error = (accept * (1 - accept) / copies).sqrt()
    assert ((frequency - accept).abs() <= 4.5 * error + 1e-12).all()
    assert 0.01 < accept.min() < 0.9
    variation = 0.5 * (s - t).abs().sum()
    assert abs((s * (1 - frequency)).sum() - variation) < 4.5 * (s.square() * error.square()).sum().sqrt()


def test_gate_reads_the_student_at_collection(world):
    """Responses that are used again keep their gate and value, though the student has moved."""
    scores, experience = scored(world)
    moved = replace(scores, taken_logp=scores.taken_logp.detach() - 1.0)
    for part in (TrustRegion(outlier="mask", gate=g) for g in ("expected", "bernoulli")):
        experience = replace(experience, extras=part.prepare(experience, Processes()))
        before, after = (applied(part, s, experience) for s in (scores, moved))
        same(before.metrics["accept"], after.metrics["accept"])
