"""Rewards of a taken token: known numbers, limits, padding, schedules, refusals. numerics 11.14."""

import math
from dataclasses import replace

import pytest
import torch
from tabular import make_rollout

from opd_lightning.errors import ConfigError
from opd_lightning.estimator.token import Token
from opd_lightning.reward.extrapolated import Extrapolated
from opd_lightning.reward.floor import Floor
from opd_lightning.reward.hard_clip import HardClip
from opd_lightning.reward.log_mixture import LogMixture
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.reward.power import Power
from opd_lightning.reward.soft_log import SoftLog
from opd_lightning.schedule import Linear
from opd_lightning.types import Experience, Needs, Scores

S = torch.tensor([[0.5, 0.2, 0.9, 1e-4]], dtype=torch.float64)
T = torch.tensor([[0.25, 0.8, 0.9, 0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[0.4, 0.1, 0.3, 0.6]], dtype=torch.float64)
RHO = T / S

ALL = {
    "soft_log": (SoftLog(), RHO.log().sign() * (1 + RHO.log().abs()).log()),
    "hard_clip": (HardClip(limit=1.0), RHO.log().clamp(-1, 1)),
    "power": (Power(alpha=2.0), T**2 - S**2),
    "log_mixture": (LogMixture(alpha=0.2), (0.2 * RHO + 0.8).log()),
    "extrapolated": (Extrapolated(scale=1.25), 1.25 * (T / REFERENCE).log() - (S / REFERENCE).log()),
}
every = pytest.mark.parametrize(("reward", "expected"), ALL.values(), ids=ALL.keys())


def experience(progress=0.0, reference=REFERENCE, mask=None):
    mask = torch.ones(S.shape, dtype=torch.bool) if mask is None else mask
    return Experience(
        rollout=make_rollout(torch.ones(S.shape, dtype=torch.long), mask),
        share=mask.double(),
        progress=progress,
        reference_taken_logp=reference.log(),
    )


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@every
def test_formula(reward, expected):
    student, teacher = S.log().requires_grad_(), T.log().requires_grad_()
    got = reward(student, teacher, experience())
    close(got, expected)
    assert not got.requires_grad


@every
def test_as_an_advantage_under_rollouts(world, reward, expected):
    """The expected gradient of the token estimator is -E sum_t A_t s_t with A from probabilities, by loops."""
    reference = torch.full_like(world.teacher_logp, 1 / world.vocab).log()
    given = replace(world.experience, reference_taken_logp=world.taken(reference))
    got = world.expected_gradient(Token(reward=reward)(world.scores, given, 0.0))
    s, t = world.student_logp.detach(), world.teacher_logp
    formula = {
        SoftLog: lambda s, t: math.copysign(math.log1p(abs(t - s)), t - s),
        HardClip: lambda s, t: max(-1.0, min(1.0, t - s)),
        Power: lambda s, t: math.exp(t) ** 2 - math.exp(s) ** 2,
        LogMixture: lambda s, t: math.log(0.2 * math.exp(t - s) + 0.8),
        Extrapolated: lambda s, t: 1.25 * (t + math.log(world.vocab)) - (s + math.log(world.vocab)),
    }[type(reward)]
    table = torch.tensor(
        [
            [formula(a, b) for a, b in zip(x, y, strict=True)]
            for x, y in zip(s.tolist(), t.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    visits = torch.tensor([world.visits[p] for p in world.prefixes], dtype=torch.float64).unsqueeze(-1)
    surrogate = -(visits * s.exp() * table * world.student_logp).sum()
    torch.testing.assert_close(got, world.gradient(surrogate), atol=1e-9, rtol=0)


def test_power_over_alpha_tends_to_the_log_ratio():  # numerics 11.14
    for alpha, atol in ((1e-3, 0.05), (1e-6, 1e-4), (1e-9, 1e-6)):
        close(Power(alpha=alpha)(S.log(), T.log(), experience()) / alpha, RHO.log(), atol=atol)
    # In float32 too, where e^(alpha l) - 1 would be rounding alone.
    small = Power(alpha=1e-6)(S.log().float(), T.log().float(), experience()) / 1e-6
    torch.testing.assert_close(small, RHO.log().float(), atol=1e-3, rtol=1e-4)


def test_log_mixture_at_alpha_1_is_the_log_ratio():  # numerics 11.14
    student, teacher = S.log(), T.log()
    plain = LogRatio()(student, teacher, experience())
    assert LogMixture(alpha=1.0)(student, teacher, experience()).equal(plain)
    close(LogMixture(alpha=1.0 - 1e-12)(student, teacher, experience()), plain, atol=1e-9)
    lowest = LogMixture(alpha=0.1)(torch.zeros(1, 1), torch.full((1, 1), -1e4), experience())
    assert lowest.item() == pytest.approx(math.log(0.9))


def test_extrapolated_at_scale_1_is_the_log_ratio_for_any_reference():  # numerics 11.14
    for reference in (REFERENCE, S, T, torch.rand_like(S)):
        got = Extrapolated(scale=1.0)(S.log(), T.log(), experience(reference=reference))
        assert got.equal(LogRatio()(S.log(), T.log(), experience()))


@pytest.mark.parametrize(
    "reward",
    [
        HardClip(limit=Linear(start=2.0, end=1.0)),
        Floor(floor=Linear(start=-0.1, end=-0.5)),
        Power(alpha=Linear(start=2.0, end=1.0)),
        LogMixture(alpha=Linear(start=0.4, end=0.2)),
        Extrapolated(scale=Linear(start=2.0, end=1.0)),
    ],
    ids=lambda r: type(r).__name__,
)
def test_a_schedule_reads_the_progress_at_collection(reward):
    name = next(iter(reward.__dataclass_fields__))
    halfway = replace(reward, **{name: getattr(reward, name).value(0.5)})
    got = reward(S.log(), T.log(), experience(progress=0.5))
    assert got.equal(halfway(S.log(), T.log(), experience()))
    assert not got.equal(reward(S.log(), T.log(), experience(progress=1.0)))


@every
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_padding_does_not_matter(reward, expected, garbage):
    mask = torch.tensor([[True, True, True, False]])
    given = experience(mask=mask)
    given = replace(
        given,
        teacher_taken_logp=T.log().masked_fill(~mask, garbage),
        reference_taken_logp=REFERENCE.log().masked_fill(~mask, garbage),
    )
    loss = Token(reward=reward)(Scores(taken_logp=S.log().masked_fill(~mask, garbage)), given, 0.0)
    close(loss.advantage, expected.masked_fill(~mask, 0.0))


def test_half_precision_is_read_in_float32():
    for reward, _ in ALL.values():
        got = reward(
            S.log().bfloat16(),
            T.log().bfloat16(),
            replace(experience(), reference_taken_logp=REFERENCE.log().bfloat16()),
        )
        assert got.dtype == torch.float32


def test_needs():
    for name, (reward, _) in ALL.items():
        assert reward.needs == Needs(reference_taken=name == "extrapolated")
        assert Token(reward=reward).needs == Needs(teacher_taken=True, reference_taken=name == "extrapolated")


def test_refusals():
    wrong = [
        (lambda: HardClip(limit=0.0), "reward.limit", "above 0"),
        (lambda: Power(alpha=0.0), "reward.alpha", "above 0"),
        (lambda: Power(alpha=math.inf), "reward.alpha", "finite"),
        (lambda: LogMixture(alpha=1.5), "reward.alpha", r"in \(0, 1\]"),
        (lambda: LogMixture(alpha=Linear(start=0.5, end=0.0)), "reward.alpha", r"in \(0, 1\]"),
        (lambda: Extrapolated(scale=-0.5), "reward.scale", "at least 0"),
        (lambda: Floor(floor=0.5), "reward.floor", "at most 0"),
        (lambda: Floor(floor=Linear(start=-1.0, end=0.1)), "reward.floor", "at most 0"),
    ]
    for build, field, condition in wrong:
        with pytest.raises(ConfigError, match=rf"`{field}` must be .*{condition}.*; use "):
            build()
    with pytest.raises(ConfigError, match="needs the reference"):
        Extrapolated(scale=1.25)(S.log(), T.log(), replace(experience(), reference_taken_logp=None))
