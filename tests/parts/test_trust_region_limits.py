"""Limits, invariances and refusals of the trust region, for every combination of its options."""

import math
from dataclasses import replace

import pytest
import torch
from gated import (
    TOKEN,
    applied,
    close,
    dirty,
    drawn,
    same,
    scored,
    tables,
    unmoved,
    written,
)
from tabular import World
from tiny import random_rollout

from opd_lightning.errors import ConfigError
from opd_lightning.estimator.token import Token
from opd_lightning.objective import Objective
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.regularizer.trust_region import TrustRegion
from opd_lightning.reward.floor import Floor
from opd_lightning.schedule import Linear
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Experience, Origin, TokenLoss
from opd_lightning.world import World as Processes

THETA = -0.4
# Every combination that is not refused.
OPTIONS = [
    *({"outlier": "clip", "gate": g, "threshold": THETA} for g in ("bernoulli", "expected", "threshold")),
    *({"outlier": "mask", "gate": g} for g in ("bernoulli", "expected")),
    {"outlier": "mask", "gate": "threshold", "threshold": THETA},
    *(
        {"gradient": gradient, "gate": g, "teacher_renormalised": renormalised} | theta
        for gradient in ("direct", "scalar")
        for renormalised in (False, True)
        for g, theta in (("bernoulli", {}), ("expected", {}), ("threshold", {"threshold": THETA}))
    ),
]
every = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
with_draws = pytest.mark.parametrize(
    "options", [o for o in OPTIONS if o["gate"] == "bernoulli"], ids=lambda o: "-".join(map(str, o.values()))
)
with_advantages = pytest.mark.parametrize(
    "options",
    [o for o in OPTIONS if o.get("gradient") != "direct"],
    ids=lambda o: "-".join(map(str, o.values())),
)


@with_draws
def test_gate_and_complement_are_one_draw(world, options):
    """numerics 11.10: P (value if accepted) + (1 - P) (value if rejected) is the expected gate's value."""
    scores, experience = scored(world)
    part = TrustRegion(**options)
    accepted = applied(part, scores, drawn(experience, 0.0))
    rejected = applied(part, scores, drawn(experience, 1 - 2**-24))
    expected = applied(replace(part, gate="expected"), scores, experience)
    plain = TOKEN(scores, experience, 0.0)
    probability = (experience.teacher_taken_logp - experience.collected_logp).clamp(max=0.0).exp()
    sure = (probability == 1.0) | ~world.mask
    same(written(accepted), written(plain))
    if part.outlier == "mask":
        assert not written(rejected)[~sure].any()
    else:
        assert (written(rejected) != written(plain))[~sure].all()
    mixed = probability * written(accepted) + (1 - probability) * written(rejected)
    same(written(rejected)[sure], written(plain)[sure])
    close(mixed, written(expected))
    close(mixed, probability * written(plain) + (1 - probability) * written(rejected))


@with_draws
def test_gate_and_complement_share_out_the_tokens_of_one_draw(world, options):
    """numerics 11.10: by the run's own draws each token is trusted or an outlier, one of them and never both."""
    scores, experience = scored(world)
    part = TrustRegion(**options)
    experience = replace(experience, extras=part.prepare(experience, Processes()))
    loss, plain = applied(part, scores, experience), TOKEN(scores, experience, 0.0)
    outlier = applied(part, scores, drawn(experience, 1 - 2**-24))  # every token that may be rejected is
    trusted = loss.metrics["accept"] == 1
    same(trusted | (loss.metrics["accept"] == 0), torch.ones_like(trusted))
    assert 0 < (trusted & world.mask).sum() < world.mask.sum()
    same(written(loss)[world.mask], torch.where(trusted, written(plain), written(outlier))[world.mask])


def test_a_gated_value_of_the_position_keeps_the_mass_of_trust(world):
    """numerics 11.10: E[M value] = P_trust value, with P_trust = sum_v min(S, T)."""
    value = torch.linspace(1.0, 2.0, len(world.prefixes), dtype=torch.float64)
    scores, experience = scored(world)
    ones = torch.ones(world.ids.shape, dtype=torch.float64)
    loss = TokenLoss(value=value[world.rows], weight=ones)
    loss = TrustRegion(outlier="mask", gate="expected")(loss, scores, experience, 0.0)
    weight = world.probability.detach().unsqueeze(-1) * world.mask
    got = torch.zeros_like(value).index_add(0, world.rows.flatten(), (weight * written(loss)).flatten())
    s, t, _, visits = tables(world)
    close(got, visits.squeeze(-1) * torch.minimum(s, t).sum(-1) * value)


# -- clip


@pytest.mark.parametrize("theta", [-1.72, -0.3, Linear(start=-2.0, end=0.0)])
def test_clip_at_a_threshold_is_the_floored_reward(world, theta):
    """numerics 11.12: reward max(r, theta), in value, gradient and advantage."""
    scores, experience = scored(world)
    loss = applied(TrustRegion(outlier="clip", gate="threshold", threshold=theta), scores, experience)
    floor = theta if isinstance(theta, float) else -2.0
    floored = Token(reward=Floor(floor=floor))(scores, experience, 0.0)
    close(loss.advantage, floored.advantage, atol=1e-12)
    unmoved(world, loss, floored)
    assert (loss.advantage != TOKEN(scores, experience, 0.0).advantage).any()


@pytest.mark.parametrize(
    ("weight", "mixture", "odds"), [(0.1, -2.56, -2.20), (0.2, -2.01, -1.39), (0.3, -1.72, -0.85)]
)
def test_floors_of_reopold(weight, mixture, odds):
    """numerics 11.12: both readings, and the bound that supports the first."""
    assert Floor.mixture(weight).floor == pytest.approx(mixture, abs=6e-3)
    assert Floor.odds(weight).floor == pytest.approx(odds, abs=6e-3)
    r = torch.linspace(-30.0, 5.0, 2001, dtype=torch.float64)[None]
    mixed = (weight + (1 - weight) * r.exp()).log() / (1 - weight)
    floored = Floor.mixture(weight)(
        torch.zeros_like(r), r, Experience(rollout=random_rollout(1), share=torch.zeros(1, 9))
    )
    assert (mixed >= floored - 1e-12).all()
    close(mixed[0, 0], floored[0, 0], atol=1e-9)


@pytest.mark.parametrize(("reading", "weight"), [("mixture", 0.0), ("mixture", 1.0), ("odds", 0.6)])
def test_floors_refuse_weights_without_a_floor(reading, weight):
    with pytest.raises(ConfigError, match=r"reward\.weight"):
        getattr(Floor, reading)(weight)


# -- what must not change


@pytest.mark.parametrize(
    ("outlier", "gradient"),
    [("clip", "direct"), ("mask", "direct"), ("forward_kl", "direct"), ("forward_kl", "scalar")],
)
def test_an_infinite_region_changes_nothing(world, outlier, gradient):
    part = TrustRegion(outlier=outlier, gate="threshold", gradient=gradient, threshold=-math.inf)
    scores, experience = scored(world)
    plain, loss = TOKEN(scores, experience, 0.0), applied(part, scores, experience)
    same(loss.advantage, plain.advantage)
    unmoved(world, loss, plain, atol=1e-15)


@with_advantages
def test_advantage_is_the_one_behind_the_value(world, options):
    """Where the whole value is -A log S(y), later parts find that A."""
    scores, experience = scored(world)
    loss = applied(TrustRegion(**options), scores, drawn(experience, 0.5))
    close(loss.value * world.mask, -loss.advantage * scores.taken_logp * world.mask)


@every
def test_other_origins_and_earlier_weights_stay(world, options):
    scores, experience = scored(world)
    origin = experience.rollout.origin.clone()
    origin[:, 0] = Origin.TEACHER
    experience = drawn(replace(experience, rollout=replace(experience.rollout, origin=origin)), 0.5)
    value = scores.taken_logp * 3
    loss = TokenLoss(value=value, weight=torch.full_like(value, 0.25), advantage=torch.full_like(value, -3.0))
    after = TrustRegion(**options)(loss, scores, experience, 0.0)
    same(written(after)[:, 0], written(loss)[:, 0])
    assert (written(after) != written(loss))[:, 1:].any()
    assert not after.metrics["rejection"][:, 0].any()


@every
def test_what_stands_outside_the_mask_never_matters(world, options):
    def outcome(fill):
        scores, experience = dirty(world, *scored(world), fill)
        loss = applied(TrustRegion(**options), scores, drawn(experience, 0.5))
        metrics = torch.stack(list(loss.metrics.values()))
        return world.expected_gradient(loss), written(loss), metrics

    for fill in (math.nan, math.inf):
        for clean, soiled in zip(outcome(0.0), outcome(fill), strict=True):
            assert soiled.isfinite().all()
            same(soiled, clean)


# numerics 11.23
def test_micro_batches_keep_the_stored_draw():
    world = World(4, 3)
    scores, experience = scored(world)
    part = TrustRegion()
    objective = Objective(
        estimator=TOKEN,
        support=TeacherTopK(k=2),
        reduction=TokenMean(),
        regularizers={"trust_region": part},
    )
    experience = objective.finish(experience, Processes())
    accept = applied(part, scores, experience).metrics["accept"][world.mask]
    assert 0.0 < accept.mean() < 1.0
    whole, metrics = objective.loss(scores, experience, 0.0)
    rows = torch.randperm(len(world.ids), generator=torch.Generator().manual_seed(1))
    parts = [objective.loss(scores.rows(r), experience.rows(r), 0.0) for r in rows.split(7)]
    close(sum(value for value, _ in parts), whole, atol=1e-12)
    close(sum(m["accept"] for _, m in parts), metrics["accept"], atol=1e-12)
    difference = sum(value for value, _ in parts) - whole
    close(world.gradient(difference), torch.zeros_like(world.theta), atol=1e-12)


# -- refusals


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"outlier": "drop"}, "outlier"),
        ({"gate": "top"}, "gate"),
        ({"gradient": "both"}, "gradient"),
        ({"outlier": "clip"}, "threshold"),
        ({"gate": "threshold"}, "threshold"),
        ({"gate": "threshold", "threshold": math.nan}, "threshold"),
        ({"gate": "threshold", "threshold": "low"}, "threshold"),
        ({"threshold": -1.0}, "threshold"),
        ({"outlier": "mask", "gate": "expected", "threshold": -1.0}, "threshold"),
        ({"outlier": "clip", "gate": "threshold", "threshold": 0.5}, "threshold"),
        ({"outlier": "clip", "threshold": -math.inf}, "threshold"),
        ({"outlier": "mask", "gate": "threshold", "threshold": math.inf}, "threshold"),
        ({"gradient": "scalar", "gate": "threshold", "threshold": math.inf}, "threshold"),
        ({"outlier": "mask", "gradient": "scalar"}, "gradient"),
        ({"outlier": "mask", "teacher_renormalised": True}, "teacher_renormalised"),
        ({"outlier": "clip", "threshold": -1.0, "coefficient": 2.0}, "coefficient"),
        ({"coefficient": -1.0}, "coefficient"),
        ({"coefficient": Linear(start=1.0, end=-1.0)}, "coefficient"),
    ],
)
def test_refuses(options, field):
    with pytest.raises(ConfigError, match=rf"^`regularizer\.trust_region\.{field}` must .*; "):
        TrustRegion(**options)


def test_refuses_a_missing_draw(world):
    with pytest.raises(ConfigError, match="draws are missing"):
        applied(TrustRegion(), *scored(world))


def test_asks_only_for_what_it_reads():
    mask = TrustRegion(outlier="mask")
    assert not mask.needs.support
    assert not mask.want.taken
    assert TrustRegion(outlier="clip", threshold=-1.0).needs.advantage
    assert TrustRegion().needs.support
    assert TrustRegion().want.support == "exact"
    assert not TrustRegion().want.taken
    assert TrustRegion(gradient="scalar").want.taken
