"""Likelihood, penalties, candidates, sampled tails and the single-step term: expected gradients by enumeration.

Truths are written from probabilities, at given prefixes, each weighted with how often it is met.
"""

from dataclasses import replace

import pytest
import torch
from tabular import make_rollout

from opd_lightning.divergence.forward_kl import ForwardKL
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.divergence.skewed import Skewed
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.candidates import PerCandidate
from opd_lightning.estimator.likelihood import Likelihood
from opd_lightning.estimator.penalty import SampledPenalty
from opd_lightning.estimator.tail_corrected import TailCorrected
from opd_lightning.estimator.tail_published import TailPublished
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.functional.divergence import reverse_kl
from opd_lightning.regularizer.step_kl import StepKL
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Linear, value_at
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Experience, Needs, Origin, Scores


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def probabilities(world):
    return world.student_logp.exp(), world.teacher_logp.exp()


def visits(world):
    return torch.tensor([world.visits[p] for p in world.prefixes], dtype=torch.float64)


def reverse(world, on=None):
    """sum over prefixes of visits sum_v S log(S/T), over the ids ``on [prefix vocab]`` alone if given."""
    s, t = probabilities(world)
    terms = s * (s / t).log()
    return (visits(world) * (terms if on is None else terms * on).sum(-1)).sum()


def forward(world):
    s, t = probabilities(world)
    return (visits(world) * (t * (t / s).log()).sum(-1)).sum()


def top(logp, k):
    """1 at each row's k largest, 0 elsewhere."""
    return torch.zeros_like(logp).scatter(-1, logp.detach().topk(k, -1).indices, 1.0)


def all_written_by(world, origin):
    return make_rollout(world.ids, world.mask, origin=torch.full_like(world.ids, origin))


# -- penalties: numerics 11.1


@pytest.mark.parametrize(
    ("kind", "of", "truth"), [("k2", "reverse_kl", reverse), ("k3", "forward_kl", forward)]
)
def test_a_penalty_has_the_gradient_it_is_named_after(world, kind, of, truth):  # numerics 11.1
    loss = SampledPenalty(kind=kind, of=of)(world.scores, world.experience, 0.0)
    close(world.expected_gradient(loss), world.gradient(truth(world)))


def test_the_absolute_penalty_weighs_scores_by_their_sign(world):  # numerics 11.1
    loss = SampledPenalty(kind="absolute", of="none")(world.scores, world.experience, 0.0)
    close(world.expected_gradient(loss), world.score_sum(lambda d, t: 1.0 if d[t] > 0 else -1.0))


# -- likelihood


def test_likelihood_of_teacher_text_is_forward_kl(world):
    """E over whole teacher responses of -log S(y), whose gradient is that of KL(T||S) over responses."""
    experience = replace(world.experience, rollout=all_written_by(world, Origin.TEACHER))
    loss = Likelihood(origins=("teacher",))(world.scores, experience, 0.0)
    drawn = (world.taken(world.teacher_logp) * world.mask).sum(-1).exp().unsqueeze(-1)
    got = world.gradient((drawn * loss.weight * loss.value).sum())
    student = (world.taken(world.student_logp) * world.mask).sum(-1)
    teacher = (world.taken(world.teacher_logp) * world.mask).sum(-1)
    close(got, world.gradient((drawn.squeeze(-1) * (teacher - student)).sum()))
    close(loss.metrics["nll"][world.mask], -world.taken(world.student_logp)[world.mask].detach())


def test_likelihood_of_own_text_teaches_nothing_in_the_mean(world):
    loss = Likelihood(origins=("student",))(world.scores, world.experience, 0.0)
    close(world.expected_gradient(loss), torch.zeros_like(world.theta), atol=1e-12)


def test_likelihood_leaves_other_tokens_alone(world):
    experience = replace(world.experience, rollout=all_written_by(world, Origin.DATA))
    assert Likelihood(origins=("teacher",))(world.scores, experience, 0.0).weight.sum() == 0
    assert (
        Likelihood(origins=("teacher", "data"))(world.scores, experience, 0.0).weight.sum()
        == world.mask.sum()
    )
    assert Likelihood(origins=("data",)).needs == Needs(teaches=frozenset({Origin.DATA}))


# -- candidates: numerics 11.9

OVER_ALL = {
    w: next(iter(PerCandidate(weight=w).want.full)).divergence for w in ("student", "student_full", "teacher")
}


def test_every_candidate_with_weight_s_is_reverse_kl(world):  # numerics 11.9
    for weight in ("student", "student_full"):  # over the vocabulary S is normalised already
        estimator = PerCandidate(weight=weight)
        for given in (world.on_everything(OVER_ALL[weight]), world.on_support(TeacherTopK(k=world.vocab))):
            close(world.expected_gradient(estimator(*given, 0.0)), world.gradient(reverse(world)))


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_candidates_on_a_support_have_its_part_of_reverse_kl(world, side):  # numerics 11.9
    support = {"teacher": TeacherTopK, "student": StudentTopK}[side](k=2)
    s, t = (p.detach() for p in probabilities(world))
    on = top(world.teacher_logp if side == "teacher" else world.student_logp, 2)

    def part(mass):
        """The support's part of grad RKL, sum over it of S log(S/T) grad log S, divided by a mass."""
        surrogate = s * (s / t).log() * on / mass * world.student_logp
        return world.gradient((visits(world).unsqueeze(-1) * surrogate).sum())

    whole = PerCandidate(weight="student_full")(*world.on_support(support), 0.0)
    close(world.expected_gradient(whole), part(1.0))
    renormalised = PerCandidate(weight="student")(*world.on_support(support), 0.0)
    close(world.expected_gradient(renormalised), part((s * on).sum(-1, keepdim=True)))


def test_candidate_weights_of_the_teacher_and_none(world):
    s, t = probabilities(world)
    on = top(world.teacher_logp, 2)
    for weight, w in (("teacher", t * on / (t * on).sum(-1, keepdim=True)), ("uniform", on / 2)):
        loss = PerCandidate(weight=weight)(*world.on_support(TeacherTopK(k=2)), 0.0)
        surrogate = (w * (s / t).log()).detach() * world.student_logp
        close(world.expected_gradient(loss), world.gradient((visits(world).unsqueeze(-1) * surrogate).sum()))


@pytest.mark.parametrize("weight", ["student", "teacher", "uniform", "student_full"])
def test_candidates_that_do_not_exist_do_not_matter(weight):
    mask = torch.tensor([[True, True, False]])
    student = torch.tensor([0.5, 0.2, 0.1]).log().expand(1, 3, 3).clone()
    teacher = torch.tensor([0.1, 0.6, 0.2]).log().expand(1, 3, 3).clone()
    valid = torch.tensor([True, True, False]).expand(1, 3, 3)
    experience = Experience(
        rollout=make_rollout(torch.ones(1, 3, dtype=torch.long), mask),
        share=mask.float(),
        support_valid=valid,
        support_teacher_logp=teacher.masked_fill(~valid, torch.nan),
    )
    given = student.masked_fill(~(valid & mask.unsqueeze(-1)), torch.nan).requires_grad_()
    loss = PerCandidate(weight=weight)(Scores(support_logp=given), experience, 0.0)
    assert loss.value.isfinite().all()
    assert loss.metrics["log_ratio"].isfinite().all()
    loss.value.sum().backward()
    assert given.grad.isfinite().all()
    assert (given.grad[~(valid & mask.unsqueeze(-1))] == 0).all()
    alone = replace(experience, support_valid=valid[..., :2], support_teacher_logp=teacher[..., :2])
    assert loss.value.equal(
        PerCandidate(weight=weight)(Scores(support_logp=student[..., :2]), alone, 0.0).value
    )


# -- head and sampled tail: numerics 11.6

SUPPORTS = {"V4": (StudentTopK(k=2), "student"), "V5": (TeacherTopK(k=2), "teacher")}


@pytest.mark.parametrize("variant", SUPPORTS)
def test_the_tail_as_published_pushes_mass_off_the_support(world, variant):  # numerics 11.6
    support, side = SUPPORTS[variant]
    loss = TailPublished()(*world.on_support(support), 0.0)
    close((world.probability.detach().unsqueeze(-1) * loss.value).sum(), reverse(world))
    on = top(world.teacher_logp if side == "teacher" else world.student_logp, 2)
    mass = (visits(world) * (world.student_logp.exp() * on).sum(-1)).sum()
    pushed = world.gradient(mass)
    assert pushed.abs().max() > 1e-2
    close(world.expected_gradient(loss), world.gradient(reverse(world)) + pushed)


@pytest.mark.parametrize("variant", SUPPORTS)
@pytest.mark.parametrize("correction", ["plus_one", "generalised"])
def test_the_corrected_tail_has_the_gradient_of_reverse_kl(world, variant, correction):  # numerics 11.6
    loss = TailCorrected(correction=correction)(*world.on_support(SUPPORTS[variant][0]), 0.0)
    close(world.expected_gradient(loss), world.gradient(reverse(world)))


@pytest.mark.parametrize("cap", [float("inf"), 0.7, Linear(start=0.9, end=0.5)])
def test_the_tail_weight_is_the_student_over_the_sampler(world, cap):
    """The tail, and nothing of the head, is multiplied by min(S / mu, cap)."""
    scores, experience = world.on_support(TeacherTopK(k=2))
    behavior = world.taken(world.student_logp).detach() + torch.linspace(
        -1, 1, world.time, dtype=torch.float64
    )
    rollout = replace(experience.rollout, behavior_logp=behavior)
    experience = replace(experience, rollout=rollout)
    plain, weighted = (TailPublished(tail_weight=w)(scores, experience, 0.5) for w in (False, cap))
    head = TopK(divergence=ReverseKL(), form="plain", biased=True)(scores, experience, 0.0)
    weight = (world.taken(world.student_logp) - behavior).exp().clamp(max=value_at(cap, 0.5)).detach()
    close(weighted.value, head.value + torch.where(world.mask, weight, 0.0) * (plain.value - head.value))
    assert (plain.value - head.value).abs().max() > 1e-2


def test_over_the_whole_vocabulary_there_is_no_tail(world):
    for estimator in (TailPublished(), TailCorrected(correction="generalised")):
        loss = estimator(*world.on_everything(reverse_kl), 0.0)
        close(world.expected_gradient(loss), world.gradient(reverse(world)))


# -- top-k by origin


def test_each_origin_has_its_divergence_and_its_scale():
    mask = torch.ones(1, 3, dtype=torch.bool)
    origin = torch.tensor([[Origin.STUDENT, Origin.TEACHER, Origin.DATA]])
    student, teacher = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.4, 0.6]).log()
    experience = Experience(
        rollout=make_rollout(torch.ones(1, 3, dtype=torch.long), mask, origin=origin),
        share=mask.float(),
        support_valid=torch.ones(1, 3, 2, dtype=torch.bool),
        support_teacher_logp=teacher.expand(1, 3, 2),
    )
    own, other = ReverseKL(), Skewed(alpha=0.1, direction="forward")
    estimator = TopK(
        divergence=own,
        other_divergence=other,
        origins=("student", "teacher"),
        origin_scale={"student": Linear(start=1.0, end=2.0), "teacher": 0.5},
    )
    loss = estimator(Scores(support_logp=student.expand(1, 3, 2)), experience, 0.5)
    expected = torch.stack([own(student, teacher), other(student, teacher), torch.tensor(0.0)])
    torch.testing.assert_close(loss.value[0], expected)
    assert loss.weight.tolist() == [[1.5, 0.5, 0.0]]
    assert estimator.needs.teaches == {Origin.STUDENT, Origin.TEACHER}
    assert {term.divergence for term in estimator.want.full} == {own, other}
    hash(estimator)


def test_both_full_terms_are_read(world):
    own, other = ReverseKL(), ForwardKL()
    rollout = world.rollout
    origin = torch.where(torch.arange(world.time) == 0, int(Origin.DATA), int(Origin.STUDENT)).expand_as(
        world.ids
    )
    scores, experience = world.on_everything(own)
    scores = replace(scores, full={**scores.full, **world.on_everything(other)[0].full})
    experience = replace(experience, rollout=replace(rollout, origin=origin))
    loss = TopK(divergence=own, other_divergence=other, origins=("student", "data"))(scores, experience, 0.0)
    s, t = (p[world.rows] for p in probabilities(world))
    expected = torch.where(origin == Origin.DATA, (t * (t / s).log()).sum(-1), (s * (s / t).log()).sum(-1))
    close(loss.value, torch.where(world.mask, expected, 0.0))


@pytest.mark.parametrize(
    "estimator",
    [PerCandidate(weight="student"), TailPublished(), StepKL(coefficient=1.0)],
    ids=lambda e: type(e).__name__,
)
def test_without_a_support_there_is_nothing_to_compare(world, estimator):
    given = (world.scores, world.experience, 0.0)
    if isinstance(estimator, StepKL):
        given = (Token(reward=LogRatio())(*given), *given)
    with pytest.raises(ConfigError, match=r"must have a support.*got none; use support="):
        estimator(*given)
