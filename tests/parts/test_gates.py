"""The sign gate, the entropy gate and the weights by position and past advantages, by enumeration."""

import math
from dataclasses import replace

import pytest
import torch
from gated import TOKEN, applied, close, dirty, same, scored, tables, top, unmoved, with_scores, written

from opd_lightning.errors import ConfigError
from opd_lightning.estimator.discounted import Discounted
from opd_lightning.functional.divergence import forward_kl
from opd_lightning.objective import Objective
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.regularizer._support import FULL, teacher_forward_kl
from opd_lightning.regularizer.entropy_gate import EntropyGate
from opd_lightning.regularizer.past_share import PastShare
from opd_lightning.regularizer.position_weight import PositionWeight
from opd_lightning.regularizer.sign_gate import SignGate
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Linear, Step
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Origin, TokenLoss
from opd_lightning.world import World as Processes

PARTS = [
    SignGate(),
    SignGate(teacher_renormalised=True, coefficient=0.5),
    EntropyGate(),
    EntropyGate(teacher_renormalised=False, threshold=1.0),
    EntropyGate(threshold=-1.0),
    PositionWeight(),
    PastShare(),
]
every = pytest.mark.parametrize("part", PARTS, ids=repr)
both = pytest.mark.parametrize("renormalised", [False, True])


def plain_ascent(s, t):
    return with_scores(s * (t / s).log(), s)


def forward_ascent(s, t, renormalised, k=2):
    """T on the support - P_T S, over P_T where the teacher is renormalised (numerics.md, section 3)."""
    on = t * top(t, k)
    mass = on.sum(-1, keepdim=True)
    return (on - mass * s) / (mass if renormalised else 1.0)


# -- sign gate


@both
def test_sign_gate_switches(world, renormalised):
    """Each token has one of the two terms: PG where T(y) > S(y), forward KL where not."""
    part = SignGate(coefficient=0.3, teacher_renormalised=renormalised)
    s, t, _, visits = tables(world)
    kept = (t > s).to(s.dtype)
    rejected = ((1 - kept) * s).sum(-1, keepdim=True)
    ascent = with_scores(kept * s * (t / s).log(), s) + 0.3 * rejected * forward_ascent(s, t, renormalised)
    close(world.expected_gradient(applied(part, *scored(world))), -visits * ascent)


def test_sign_gate_at_minus_one_is_the_estimator(world):
    """numerics 11.13: threshold -1 leaves plain policy gradient on all tokens."""
    scores, experience = scored(world)
    loss = applied(SignGate(threshold=-1.0), scores, experience)
    unmoved(world, loss, TOKEN(scores, experience, 0.0))
    assert not loss.metrics["sign_gate"].any()


@both
def test_sign_gate_at_one_is_forward_kl(world, renormalised):
    """numerics 11.13: threshold 1 leaves forward KL on all tokens, and no policy gradient."""
    loss = applied(SignGate(threshold=1.0, teacher_renormalised=renormalised), *scored(world))
    s, t, _, visits = tables(world)
    close(world.expected_gradient(loss), -visits * forward_ascent(s, t, renormalised))
    same(loss.metrics["sign_gate"], world.mask.to(torch.float64))


# numerics 11.27
def test_sign_gate_has_a_threshold_between(world):
    """Neither limit nor sign: the gate is the difference of probabilities, and may move over the run."""
    scores, experience = scored(world)
    part = SignGate(threshold=Step(before=0.0, after=0.2, at=0.5))
    difference = experience.teacher_taken_logp.exp() - scores.taken_logp.exp()
    for progress, theta in ((0.0, 0.0), (1.0, 0.2)):
        loss = part(TOKEN(scores, experience, progress), scores, experience, progress)
        same(loss.metrics["sign_gate"] == 1, (difference <= theta) & world.mask)
    assert ((difference > 0.0) & (difference <= 0.2) & world.mask).any()


def test_sign_gate_is_open_where_both_models_agree(world):
    """T(y) = S(y) counts as a token that the teacher does not like more: r <= 0."""
    scores, experience = scored(world)
    experience = replace(experience, teacher_taken_logp=scores.taken_logp.detach())
    loss = applied(SignGate(), scores, experience)
    same(loss.metrics["sign_gate"], world.mask.to(torch.float64))


# -- entropy gate


@both
def test_entropy_gate_adds(world, renormalised):
    """Policy gradient stays on all tokens; forward KL comes where the teacher's entropy is above h."""
    s, t, _, visits = tables(world)
    entropy = -(t * t.log()).sum(-1, keepdim=True)
    h = entropy.median().item() + 1e-6
    part = EntropyGate(threshold=h, coefficient=0.3, teacher_renormalised=renormalised)
    ascent = plain_ascent(s, t) + 0.3 * (entropy > h).to(s.dtype) * forward_ascent(s, t, renormalised)
    close(world.expected_gradient(applied(part, *scored(world))), -visits * ascent)


def test_entropy_gate_above_all_entropies_is_the_estimator(world):
    """numerics 11.13: h > log V is plain on-policy distillation."""
    scores, experience = scored(world)
    loss = applied(EntropyGate(threshold=math.log(world.vocab) + 1e-6), scores, experience)
    unmoved(world, loss, TOKEN(scores, experience, 0.0))
    assert not loss.metrics["entropy_gate"].any()


@both
def test_entropy_gate_below_zero_is_open_everywhere(world, renormalised):
    """numerics 11.13: h < 0 adds forward KL on all tokens."""
    loss = applied(EntropyGate(threshold=-1e-6, teacher_renormalised=renormalised), *scored(world))
    s, t, _, visits = tables(world)
    ascent = plain_ascent(s, t) + forward_ascent(s, t, renormalised)
    close(world.expected_gradient(loss), -visits * ascent)
    same(loss.metrics["entropy_gate"], world.mask.to(torch.float64))


@both
def test_forward_kl_over_the_whole_vocabulary(world, renormalised):
    """On the full support the term is KL(T||S), renormalised or not, as on a support of all ids."""
    scores, experience = world.on_everything(forward_kl)
    whole = teacher_forward_kl(scores, experience, world.mask, renormalised=renormalised)
    listed = teacher_forward_kl(*scored(world, k=world.vocab), world.mask, renormalised=renormalised)
    close(whole, listed, atol=1e-12)
    with pytest.raises(ConfigError, match="hold the forward KL"):
        teacher_forward_kl(replace(scores, full={}), experience, world.mask, renormalised=renormalised)
    assert FULL in SignGate().want.full & EntropyGate().want.full


# -- weights


def test_position_weight_is_a_sigmoid_of_the_place(world):
    loss = applied(PositionWeight(least=0.25, center=0.3, width=0.1), *scored(world))
    for row, response in enumerate(world.responses):
        for t in range(len(response)):
            place = (t + 1) / len(response)
            expected = 0.25 + 0.75 / (1 + math.exp(-(place - 0.3) / 0.1))
            assert loss.weight[row, t].item() == pytest.approx(expected, abs=1e-12)
    assert not loss.weight[~world.mask].any()


def test_past_share_counts_what_went_before(world):
    scores, experience = scored(world)
    loss = applied(PastShare(gamma=0.5), scores, experience)
    r = (experience.teacher_taken_logp - scores.taken_logp.detach()).abs()
    for row, response in enumerate(world.responses):
        whole = sum(r[row, t].item() for t in range(len(response)))
        past = 0.0
        for t in range(len(response)):
            assert loss.weight[row, t].item() == pytest.approx(1 + 0.5 * (1 - past / whole), abs=1e-9)
            past += r[row, t].item()
    assert not loss.weight[~world.mask].any()


def test_past_share_reads_the_advantages_of_any_estimator(world):
    scores, experience = scored(world)
    loss = Discounted(reward=LogRatio(), gamma=0.9)(scores, experience, 0.0)
    weighted = PastShare(gamma=1.0)(loss, scores, experience, 0.0)
    size = loss.advantage.abs()
    last = world.mask.sum(-1) - 1
    rows = torch.arange(len(last))
    close(weighted.weight[rows, last], 1 + size[rows, last] / size.sum(-1))
    with pytest.raises(ConfigError, match="advantages"):
        PastShare()(replace(loss, advantage=None), scores, experience, 0.0)


@pytest.mark.parametrize("part", [PositionWeight(), PastShare()], ids=repr)
def test_weights_are_detached(world, part):
    """The expected gradient is the estimator's, token by token, times a number."""
    loss = applied(part, *scored(world))
    fixed = replace(loss, weight=loss.weight.detach())
    unmoved(world, loss, fixed)
    assert not loss.weight.requires_grad


@pytest.mark.parametrize("part", [PositionWeight(least=1.0), PastShare(gamma=0.0)], ids=repr)
def test_weights_that_change_nothing(world, part):
    scores, experience = scored(world)
    unmoved(world, applied(part, scores, experience), TOKEN(scores, experience, 0.0))


@pytest.mark.parametrize("signal", [0.0, 1e-30])
def test_past_share_without_a_signal(world, signal):
    """Responses on which both models agree have finite weights."""
    scores, experience = scored(world)
    zeros = torch.full_like(scores.taken_logp, signal)
    loss = TokenLoss(value=zeros, weight=zeros + 1, advantage=zeros)
    weight = PastShare()(loss, scores, experience, 0.0).weight
    close(weight, torch.where(world.mask, 1.5, 1.0).to(weight.dtype), atol=1e-6)


# -- all of them


@every
def test_what_stands_outside_the_mask_never_matters(world, part):
    def outcome(fill):
        scores, experience = dirty(world, *scored(world), fill)
        loss = applied(part, scores, experience)
        return world.expected_gradient(loss), written(loss), torch.stack(list(loss.metrics.values()))

    for fill in (math.nan, math.inf):
        for clean, soiled in zip(outcome(0.0), outcome(fill), strict=True):
            assert soiled.isfinite().all()
            same(soiled, clean)


@every
def test_tokens_of_others_stay_as_they_are(world, part):
    scores, experience = scored(world)
    origin = experience.rollout.origin.clone()
    origin[:, 0] = Origin.TEACHER
    experience = replace(experience, rollout=replace(experience.rollout, origin=origin))
    value = scores.taken_logp * 3
    loss = TokenLoss(value=value, weight=torch.full_like(value, 0.25), advantage=torch.full_like(value, -3.0))
    after = part(loss, scores, experience, 0.0)
    same(written(after)[:, 0], written(loss)[:, 0])
    assert (written(after) != written(loss))[:, 1:].any()


# numerics 11.23
@every
def test_micro_batches_add_up(world, part):
    scores, experience = scored(world)
    objective = Objective(
        estimator=TOKEN, support=TeacherTopK(k=2), reduction=TokenMean(), regularizers={"part": part}
    )
    experience = objective.finish(experience, Processes())
    whole, metrics = objective.loss(scores, experience, 0.0)
    rows = torch.randperm(len(world.ids), generator=torch.Generator().manual_seed(1))
    parts = [objective.loss(scores.rows(r), experience.rows(r), 0.0) for r in rows.split(5)]
    close(sum(value for value, _ in parts), whole, atol=1e-12)
    for name, value in metrics.items():
        close(sum(m[name] for _, m in parts), value, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options", "field"),
    [
        (SignGate, {"threshold": 1.5}, "sign_gate.threshold"),
        (SignGate, {"threshold": Linear(start=0.0, end=-2.0)}, "sign_gate.threshold"),
        (SignGate, {"coefficient": -1.0}, "sign_gate.coefficient"),
        (EntropyGate, {"threshold": math.nan}, "entropy_gate.threshold"),
        (EntropyGate, {"coefficient": math.inf}, "entropy_gate.coefficient"),
        (PositionWeight, {"least": 1.5}, "position_weight.least"),
        (PositionWeight, {"center": -0.1}, "position_weight.center"),
        (PositionWeight, {"width": 0.0}, "position_weight.width"),
        (PastShare, {"gamma": -0.5}, "past_share.gamma"),
        (PastShare, {"gamma": "half"}, "past_share.gamma"),
    ],
)
def test_refuses(kind, options, field):
    with pytest.raises(ConfigError, match=rf"^`regularizer\.{field.replace('.', '[.]')}` must .*; use "):
        kind(**options)
