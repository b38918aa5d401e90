"""Imitation of the teacher's and the data's tokens by enumeration: numerics.md section 11, point 11."""

from dataclasses import replace

import pytest
import torch
from tabular import World, with_reference

from opd_lightning.errors import ConfigError
from opd_lightning.estimator.token import Token
from opd_lightning.regularizer.imitation import Imitation
from opd_lightning.regularizer.reference_kl import ReferenceKL
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Linear
from opd_lightning.types import Origin, TokenLoss


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def taught(world, origin=Origin.TEACHER):
    """The world's experience with every token written by ``origin``."""
    rollout = replace(world.rollout, origin=torch.full_like(world.ids, origin))
    return replace(world.experience, rollout=rollout)


def nothing(world):
    zeros = torch.zeros(world.ids.shape, dtype=torch.float64)
    return TokenLoss(value=zeros, weight=torch.zeros_like(zeros))


def teacher_probability(world):
    return (world.taken(world.teacher_logp) * world.mask).sum(-1).exp()


def expected(world, loss):
    """The gradient of a loss whose responses the teacher wrote."""
    weight = teacher_probability(world).unsqueeze(-1) * world.mask
    return world.gradient((weight * loss.weight * loss.value).sum())


def forward_kl(world):
    """KL(T||S) over whole responses, which for y ~ T is the sum of those at the teacher's prefixes."""
    student = (world.taken(world.student_logp) * world.mask).sum(-1)
    teacher = (world.taken(world.teacher_logp) * world.mask).sum(-1)
    return (teacher.exp() * (teacher - student)).sum()


def imitate(world, **settings):
    part = Imitation(**({"coefficient": 0.3} | settings))
    return part(nothing(world), world.scores, taught(world), 0.0)


def test_direct_is_the_gradient_of_the_forward_kl(world):  # numerics 11.11
    got, want = expected(world, imitate(world)), 0.3 * world.gradient(forward_kl(world))
    close(got, want)
    assert want.abs().max() > 1e-2


def test_direct_value_is_the_cross_entropy(world):
    loss = imitate(world)
    close(loss.value.detach(), -0.3 * world.taken(world.student_logp.detach()) * world.mask)
    close(loss.metrics["imitation"], -world.taken(world.student_logp.detach()) * world.mask)
    close(loss.weight, world.mask.double())


def test_scalar_is_what_the_code_of_tropd_has(world):  # numerics 11.11
    """-coefficient E_T[(log S - log T) s], with the score s written by hand."""
    s, t = world.student_logp.detach(), world.teacher_logp
    want = torch.zeros_like(s)
    probability = teacher_probability(world)
    for row, response in enumerate(world.responses):
        for position, y in enumerate(response):
            at = world.index[response[:position]]
            score = -s[at].exp()
            score[y] += 1.0
            want[at] -= 0.3 * probability[row] * (s[at, y] - t[at, y]) * score
    close(expected(world, imitate(world, gradient="scalar", biased=True)), want)


@pytest.mark.parametrize("seed", range(5))
def test_scalar_leads_away_from_the_teacher(seed):  # numerics 11.11
    world = World(6, 1, seed=seed)
    away = expected(world, imitate(world, gradient="scalar", biased=True)).flatten()
    towards = expected(world, imitate(world)).flatten()
    assert torch.cosine_similarity(away, towards, dim=0) < -0.5


@pytest.mark.parametrize("origin", [Origin.TEACHER, Origin.DATA])
@pytest.mark.parametrize("origins", [["teacher"], ["data"], ["teacher", "data"]])
def test_only_tokens_of_the_given_origins(world, origin, origins):
    part = Imitation(coefficient=1.0, origins=origins)
    base = Token(reward=LogRatio())(world.scores, world.experience, 0.0)
    experience = taught(world)
    mixed = experience.rollout.origin.clone()
    mixed[:, 0], mixed[:, 1] = Origin.STUDENT, origin
    experience = replace(experience, rollout=replace(experience.rollout, origin=mixed))
    loss = part(base, world.scores, experience, 0.0)
    expected = torch.zeros_like(world.mask)
    for name in origins:
        expected |= world.mask & (mixed == Origin[name.upper()])
    close(loss.value - base.value, -world.scores.taken_logp * expected)
    assert part.needs.teaches == {Origin[name.upper()] for name in origins}


@pytest.mark.parametrize("filler", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("gradient", ["direct", "scalar"])
def test_what_stands_outside_never_matters(world, gradient, filler):
    part = Imitation(coefficient=1.0, gradient=gradient, biased=gradient == "scalar")

    def lost(fill):
        scores = replace(world.scores, taken_logp=fill(world.scores.taken_logp))
        experience = taught(world)
        experience = replace(experience, teacher_taken_logp=fill(experience.teacher_taken_logp))
        base = nothing(world)
        return part(replace(base, value=fill(base.value)), scores, experience, 0.0)

    clean, dirty = lost(lambda v: v), lost(lambda v: torch.where(world.mask, v, filler + world.theta.sum()))
    close(dirty.value.detach(), clean.value.detach(), atol=0)
    close(expected(world, dirty), expected(world, clean), atol=0)


def test_order_among_terms_does_not_matter(world):
    table = torch.ones_like(world.theta.detach()).cumsum(-1)
    scores, experience = with_reference(world, table)
    origin = world.rollout.origin.clone()
    origin[:, 0] = Origin.DATA
    experience = replace(experience, rollout=replace(experience.rollout, origin=origin))
    base = Token(reward=LogRatio())(scores, experience, 0.0)
    base = replace(base, weight=base.weight * 0.5)
    parts = [Imitation(coefficient=0.3), ReferenceKL(coefficient=0.2)]

    def lost(parts):
        loss = base
        for part in parts:
            loss = part(loss, scores, experience, 0.0)
        return loss

    one, other = lost(parts), lost(parts[::-1])
    close(one.value * one.weight, other.value * other.weight, atol=1e-12)
    assert one.metrics.keys() == other.metrics.keys()


def test_the_coefficient_may_be_a_schedule(world):
    part = Imitation(coefficient=Linear(start=1.0, end=0.0))
    values = [part(nothing(world), world.scores, taught(world), at).value for at in (0.0, 0.75)]
    close(values[1], 0.25 * values[0])


def test_the_teacher_scores_only_for_scalar():
    assert not Imitation(coefficient=1.0).needs.teacher_taken
    assert Imitation(coefficient=1.0, gradient="scalar", biased=True).needs.teacher_taken


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficient": -1.0}, "coefficient` must be a finite number of at least 0, got -1.0"),
        ({"gradient": "scalar"}, "opposite to imitation.*use gradient=direct"),
        ({"gradient": "k1"}, "gradient` must be direct or scalar"),
        ({"origins": ["student", "data"]}, "mean gradient of 0.*use \\[teacher, data\\]"),
        ({"origins": ["environment"]}, "be out of teacher, data"),
        ({"origins": "data"}, "must be a list"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        Imitation(**({"coefficient": 0.1} | settings))


def test_the_coefficient_has_no_default():
    with pytest.raises(TypeError, match="coefficient"):
        Imitation()
