"""The reference KL by enumeration against autograd of the exact divergence: numerics.md section 11, point 22."""

from dataclasses import replace

import pytest
import torch
from tabular import with_reference

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.objective import Objective
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.regularizer._terms import add
from opd_lightning.regularizer.reference_kl import ReferenceKL
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Linear
from opd_lightning.support.full import Full
from opd_lightning.support.none import NoSupport
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Origin, TokenLoss

EXACT = pytest.mark.parametrize("form", ["full", "k2"])


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def nothing(world):
    """A loss of zeros, to see a term alone."""
    zeros = torch.zeros(world.ids.shape, dtype=torch.float64)
    return TokenLoss(value=zeros, weight=world.mask.double())


def table(world):
    random = torch.Generator().manual_seed(7)
    return torch.randn(world.theta.shape, generator=random, dtype=torch.float64)


def exact(world, reference, visits=None):
    """Sum over prefixes, as the student visits them, of KL(S||R) there; the visits held fixed."""
    s, r = world.student_logp, reference.log_softmax(-1)
    per_prefix = (s.exp() * (s - r)).sum(-1)
    return sum(p * per_prefix[world.index[prefix]] for prefix, p in world.visits.items())


@EXACT
def test_expected_gradient_is_the_exact_one(world, form):  # numerics 11.22
    part, reference = ReferenceKL(coefficient=0.3, form=form), table(world)
    loss = part(nothing(world), *with_reference(world, reference), 0.0)
    got, want = world.expected_gradient(loss), 0.3 * world.gradient(exact(world, reference))
    close(got, want)
    assert want.abs().max() > 1e-2


def test_full_has_the_exact_value_at_every_position(world):  # numerics 11.22
    reference = table(world)
    loss = ReferenceKL(coefficient=2.0)(nothing(world), *with_reference(world, reference), 0.0)
    s, r = world.student_logp.detach(), reference.log_softmax(-1)
    want = (s.exp() * (s - r)).sum(-1)[world.rows] * world.mask
    close((loss.value * loss.weight).detach(), 2.0 * want)
    close(loss.metrics["reference_kl"], want)


def test_k2_value_is_half_the_square(world):
    reference = table(world)
    scores, experience = with_reference(world, reference)
    loss = ReferenceKL(coefficient=2.0, form="k2")(nothing(world), scores, experience, 0.0)
    d = world.taken(world.student_logp.detach()) - world.taken(reference.log_softmax(-1))
    close(loss.value.detach(), d.square() * world.mask)


@EXACT
def test_at_the_reference_value_and_gradient_are_0(world, form):  # numerics 11.22
    scores, experience = with_reference(world, world.theta.detach())
    loss = ReferenceKL(coefficient=1.0, form=form)(nothing(world), scores, experience, 0.0)
    close(loss.value.detach(), torch.zeros_like(loss.value), atol=1e-12)
    close(world.expected_gradient(loss), torch.zeros_like(world.theta), atol=1e-12)


@pytest.mark.parametrize("support_form", ["renormalised", "tail", "plain"])
def test_on_a_support_of_every_id_it_is_exact(world, support_form):
    part = ReferenceKL(coefficient=1.0, form="support", support_form=support_form, biased=True)
    reference = table(world)
    loss = part(nothing(world), *with_reference(world, reference, TeacherTopK(k=world.vocab)), 0.0)
    atol = 1e-5 if support_form == "tail" else 1e-9  # the tail bucket keeps a mass of 1e-7
    close(world.expected_gradient(loss), world.gradient(exact(world, reference)), atol)


@pytest.mark.parametrize("support_form", ["renormalised", "plain"])
def test_on_a_smaller_support_it_is_the_named_other_thing(world, support_form):
    """The sum over the support, of both sides divided by their mass or as they are, written out by hand."""
    part = ReferenceKL(coefficient=1.0, form="support", support_form=support_form, biased=True)
    reference, k = table(world), 2
    loss = part(nothing(world), *with_reference(world, reference, TeacherTopK(k=k)), 0.0)
    ids = world.teacher.argsort(-1, descending=True)[:, :k]
    s, r = (logp.gather(-1, ids) for logp in (world.student_logp, reference.log_softmax(-1)))
    if support_form == "renormalised":
        s, r = (logp - logp.exp().sum(-1, keepdim=True).log() for logp in (s, r))
    truth = sum(p * (s.exp() * (s - r)).sum(-1)[world.index[prefix]] for prefix, p in world.visits.items())
    got = world.expected_gradient(loss)
    close(got, world.gradient(truth))
    assert (got - world.gradient(exact(world, reference))).abs().max() > 1e-2


@EXACT
def test_an_earlier_weight_leaves_the_term_alone_and_a_later_one_scales_both(world, form):
    scores, experience = with_reference(world, table(world))
    part, base = ReferenceKL(coefficient=1.0, form=form), Token(reward=LogRatio())(scores, experience, 0.0)
    alone = part(nothing(world), scores, experience, 0.0).value
    gate = torch.arange(world.ids.numel()).view(world.ids.shape) % 3 / 2.0  # 0, 1/2, 1
    gated = replace(base, weight=base.weight * gate)
    both = part(gated, scores, experience, 0.0)
    close(both.value * both.weight, gated.value * gated.weight + alone)
    close(both.advantage, base.advantage * gated.weight)
    assert both.weight[world.mask].eq(1).all()


@EXACT
def test_only_the_students_tokens_inside_the_horizon_have_the_term(world, form):
    scores, experience = with_reference(world, table(world))
    origin = world.rollout.origin.clone()
    origin[:, 0] = Origin.TEACHER
    horizon = torch.ones_like(world.mask)
    horizon[:, -1] = False
    experience = replace(experience, rollout=replace(world.rollout, origin=origin, horizon=horizon))
    base = TokenLoss(value=torch.full(world.ids.shape, 5.0).double(), weight=world.mask.double())
    loss = ReferenceKL(coefficient=1.0, form=form)(base, scores, experience, 0.0)
    sampled = experience.rollout.sampled
    assert (loss.value[world.mask & ~sampled] == 5.0).all()
    assert not loss.metrics["reference_kl"][~sampled].any()


@pytest.mark.parametrize("filler", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("form", ["full", "k2", "support"])
def test_what_stands_outside_never_matters(world, form, filler):
    part = ReferenceKL(coefficient=1.0, form=form, biased=form == "support")

    def lost(fill):
        scores, experience = with_reference(world, table(world), TeacherTopK(k=2))
        base = Token(reward=LogRatio())(scores, experience, 0.0)
        scores = replace(
            scores,
            taken_logp=fill(scores.taken_logp),
            support_logp=fill(scores.support_logp),
            full={term: fill(value) for term, value in scores.full.items()},
        )
        names = ("reference_taken_logp", "reference_support_logp", "reference_hidden")
        experience = replace(experience, **{name: fill(getattr(experience, name)) for name in names})
        return part(replace(base, value=fill(base.value)), scores, experience, 0.0)

    def fill(values):
        mask = world.mask if values.dim() == 2 else world.mask.unsqueeze(-1)
        outside = filler + world.theta.sum()  # with a graph, or no NaN could come back through it
        return torch.where(mask, values, outside)

    clean, dirty = lost(lambda values: values), lost(fill)
    close(dirty.value.detach(), clean.value.detach(), atol=0)
    close(world.expected_gradient(dirty), world.expected_gradient(clean), atol=0)


def test_the_coefficient_may_be_a_schedule(world):
    scores, experience = with_reference(world, table(world))
    part = ReferenceKL(coefficient=Linear(start=1.0, end=0.0))
    start, late = (part(nothing(world), scores, experience, at).value for at in (0.0, 0.75))
    close(late, 0.25 * start)


def test_only_what_the_form_reads_is_asked_for():
    full, sampled = ReferenceKL(coefficient=1.0), ReferenceKL(coefficient=1.0, form="k2")
    support = ReferenceKL(coefficient=1.0, form="support", biased=True)
    assert full.needs.reference_hidden
    assert not full.needs.reference_taken
    assert sampled.needs.reference_taken
    assert not sampled.needs.reference_hidden
    assert support.needs.reference_support
    assert support.needs.least_support == 2
    assert full.want.full
    assert not full.want.taken
    assert sampled.want.taken
    assert not sampled.want.full
    assert all(part.needs.reference for part in (full, sampled, support))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficient": -0.1}, "coefficient` must be a finite number of at least 0, got -0.1"),
        ({"coefficient": float("inf")}, "finite"),
        ({"coefficient": Linear(start=0.1, end=-0.1)}, "coefficient"),
        ({"form": "k1"}, "form` must be one of full, k2, support, got 'k1'"),
        ({"form": "support"}, "biased` must say .* use form=full or form=k2"),
        ({"form": "support", "biased": True, "support_form": "raw"}, "support_form"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReferenceKL(**({"coefficient": 0.1} | settings))


def test_the_coefficient_has_no_default():
    with pytest.raises(TypeError, match="coefficient"):
        ReferenceKL()


@pytest.mark.parametrize(
    ("support", "message"), [(Full(), "got the whole vocabulary; use"), (NoSupport(), "got none")]
)
def test_the_objective_refuses_a_support_without_ids(support, message):
    part = ReferenceKL(coefficient=0.1, form="support", biased=True)
    with pytest.raises(ConfigError, match=message):
        Objective(
            estimator=Token(reward=LogRatio()),
            support=support,
            reduction=TokenMean(),
            regularizers={"reference_kl": part},
        )
    # The exact form works beside either estimator.
    estimator = TopK(divergence=ReverseKL()) if isinstance(support, Full) else Token(reward=LogRatio())
    regularizers = {"reference_kl": ReferenceKL(coefficient=0.1)}
    Objective(estimator=estimator, support=support, reduction=TokenMean(), regularizers=regularizers)


def test_a_term_of_another_token_is_never_read():
    loss = TokenLoss(value=torch.tensor([[1.0, float("nan")]]), weight=torch.tensor([[0.5, 0.0]]))
    term = torch.tensor([[float("inf"), 3.0]])
    loss = add(loss, term, torch.tensor([[False, True]]))
    assert loss.value.tolist() == [[0.5, 3.0]]
    assert loss.weight.tolist() == [[1.0, 1.0]]
    assert loss.advantage is None
