"""Expected gradients by enumeration: the top-k estimator against the exact objective.

The objective is the divergence of each position, averaged over the prefixes (and, where the support
depends on it, the taken token) that the student draws at temperature 1; prefixes and supports are
given. It is written from probabilities below, independent of the package's log-space code.
"""

import itertools
from functools import partial

import pytest
import torch

from opd_lightning.divergence.forward_kl import ForwardKL
from opd_lightning.divergence.generalised_forward_kl import GeneralisedForwardKL
from opd_lightning.divergence.generalised_reverse_kl import GeneralisedReverseKL
from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.divergence.skewed import Skewed
from opd_lightning.estimator.topk import TopK
from opd_lightning.support.augmented import Augmented
from opd_lightning.support.sampled import Sampled
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.support.union import Union


def kl(a, b):
    return (a * (a / b).log()).sum()


def jsd(s, t, beta):
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


DIVERGENCES = {
    "reverse_kl": (ReverseKL(), kl),
    "forward_kl": (ForwardKL(), lambda s, t: kl(t, s)),
    "generalised_reverse_kl": (GeneralisedReverseKL(), lambda s, t: (s * (s / t).log() - s + t).sum()),
    "generalised_forward_kl": (GeneralisedForwardKL(), lambda s, t: (t * (t / s).log() - t + s).sum()),
    "jsd": (JSD(beta=0.3), partial(jsd, beta=0.3)),
    "jsd scaled": (JSD(beta=0.3, scaled=True), lambda s, t: jsd(s, t, 0.3) / 0.21),
    "jsd 0": (JSD(beta=0.0), lambda s, t: kl(t, s)),
    "jsd 1": (JSD(beta=1.0), kl),
    "skewed reverse": (Skewed(alpha=0.1, direction="reverse"), lambda s, t: kl(s, 0.1 * s + 0.9 * t)),
    "skewed forward": (Skewed(alpha=0.1, direction="forward"), lambda s, t: kl(t, 0.1 * t + 0.9 * s)),
}

FORMS = {
    "renormalised": lambda p: p / p.sum(),
    "tail": lambda p: torch.cat([p, 1 - p.sum().unsqueeze(0)]),
    "plain": lambda p: p,
}


def best(row, k):
    return set(sorted(range(len(row)), key=lambda v: -row[v])[:k])


# Each support, and the set of ids it stands for at a prefix where token y was taken.
SUPPORTS = {
    "sampled": (Sampled(), lambda s, t, y: {y}),
    "teacher": (TeacherTopK(k=2), lambda s, t, y: best(t, 2)),
    "student": (StudentTopK(k=2), lambda s, t, y: best(s, 2)),
    "augmented": (Augmented(k=1), lambda s, t, y: best(t, 1) | {y}),
    "union": (Union(k=1), lambda s, t, y: best(t, 1) | best(s, 1)),
}


def objective(world, divergence, form, select):
    """sum over prefixes and taken tokens of sg[reach(prefix) S(y)] D(form(S on ids), form(T on ids))."""
    student, teacher = world.student_logp.exp(), world.teacher_logp.exp()
    total = torch.zeros((), dtype=torch.float64)
    for prefix, visits in world.visits.items():
        s, t = student[world.index[prefix]], teacher[world.index[prefix]]
        for y in range(world.vocab):
            ids = sorted(select(s.tolist(), t.tolist(), y))
            total = total + visits * s[y].item() * divergence(form(s[ids]), form(t[ids]))
    return total


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


CASES = [
    case
    for case in itertools.product(DIVERGENCES, FORMS, SUPPORTS)
    if case[1:] != ("renormalised", "sampled")  # refused: nothing to compare
]


# numerics 11.2, 11.3, 11.4, 11.5, 11.7, 11.19
@pytest.mark.parametrize(("divergence", "form", "support"), CASES)
def test_topk_differentiates_what_it_says(world, divergence, form, support):
    """Every divergence in every form on every support, under rollouts."""
    component, truth = DIVERGENCES[divergence]
    select, ids = SUPPORTS[support]
    estimator = TopK(divergence=component, form=form, biased=form == "plain")
    loss = estimator(*world.on_support(select), 0.0)
    expected = objective(world, truth, FORMS[form], ids)
    close((world.probability.detach().unsqueeze(-1) * loss.value).sum(), expected)
    expected_gradient = world.gradient(expected)
    if support != "union":  # where both tops agree, one id is left and there is nothing to learn
        assert expected_gradient.abs().max() > 1e-3
    close(world.expected_gradient(loss), expected_gradient)


@pytest.mark.parametrize("support", [name for name in SUPPORTS if name != "sampled"])
def test_renormalised_scores_do_as_well_as_exact_ones(world, support):
    """A scorer may leave the normaliser out: same value, same gradient, none off the support."""
    select, _ = SUPPORTS[support]
    estimator = TopK(divergence=ReverseKL(), form="renormalised")
    exact = estimator(*world.on_support(select), 0.0)
    renormalised = estimator(*world.on_support(select, renormalised=True), 0.0)
    close(renormalised.value, exact.value, atol=1e-12)
    close(world.expected_gradient(renormalised), world.expected_gradient(exact), atol=1e-12)


# numerics 11.2, 11.19
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_full_support(world, divergence, form):
    """The whole vocabulary through the head, whatever the form."""
    component, truth = DIVERGENCES[divergence]
    estimator = TopK(divergence=component, form=form, biased=form == "plain")
    loss = estimator(*world.on_everything(component), 0.0)
    everything = objective(world, truth, FORMS["plain"], lambda s, t, y: set(range(world.vocab)))
    close(world.expected_gradient(loss), world.gradient(everything))


# numerics 11.2
@pytest.mark.parametrize("form", ["renormalised", "plain"])
def test_all_ids_as_support_equal_the_full_support(world, form):
    """K = V."""
    estimator = TopK(divergence=ReverseKL(), form=form, biased=form == "plain")
    listed = estimator(*world.on_support(TeacherTopK(k=world.vocab)), 0.0)
    whole = estimator(*world.on_everything(ReverseKL()), 0.0)
    close(listed.value, whole.value, atol=1e-12)
    close(world.expected_gradient(listed), world.expected_gradient(whole), atol=1e-12)


# numerics 11.15
def test_taken_or_not_taken_is_not_reverse_kl(world):
    """The two-category divergence of the taken token has the gradient of section 2, not RKL's."""
    loss = TopK(divergence=ReverseKL(), form="tail")(*world.on_support(Sampled()), 0.0)
    got = world.expected_gradient(loss)
    s, t = world.student_logp.detach().exp(), world.teacher_logp.exp()
    visits = torch.tensor([world.visits[p] for p in world.prefixes], dtype=torch.float64).unsqueeze(-1)
    inner = s.square() * ((s / t).log() - ((1 - s) / (1 - t)).log())
    # sum_y inner_y grad log S_y, with d log S_y / dz = onehot(y) - S
    close(got, visits * (inner - s * inner.sum(-1, keepdim=True)))
    reverse = visits * s * ((s / t).log() - (s * (s / t).log()).sum(-1, keepdim=True))
    assert (got - reverse).abs().max() > 1e-2
