"""The top-k estimator: known numbers, refusals, what must not matter."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from tabular import make_rollout

from opd_lightning.divergence.forward_kl import ForwardKL
from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.divergence.skewed import Skewed
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.topk import TopK
from opd_lightning.types import Experience, FullTerm, Needs, Origin, Scores, Want

MASK = torch.tensor([[True, True, False]])
FORMS = ["renormalised", "tail", "plain"]
forms = pytest.mark.parametrize("form", FORMS)


def make(student=(0.4, 0.2, 0.3), teacher=(0.1, 0.6, 0.2), valid=(True, True, False), mask=MASK, **changed):
    """The same three candidates at every position, the third of which does not exist."""
    shape = (*mask.shape, len(student))
    student = torch.tensor(student, dtype=torch.float64).log().expand(shape).clone().requires_grad_()
    experience = Experience(
        rollout=make_rollout(torch.ones_like(mask, dtype=torch.long), mask, **changed),
        share=torch.ones(mask.shape),
        support_ids=torch.arange(shape[-1]).expand(shape),
        support_valid=torch.tensor(valid, dtype=torch.bool).expand(shape),
        support_teacher_logp=torch.tensor(teacher, dtype=torch.float64).log().expand(shape),
    )
    return Scores(support_logp=student), experience


def test_known_numbers():
    expected = {
        # S = (2/3, 1/3), T = (1/7, 6/7): 2/3 log(14/3) + 1/3 log(7/18) = 1.026964 - .314820
        "renormalised": 0.712144,
        # S = (.4, .2, .4), T = (.1, .6, .3): .4 log 4 + .2 log(1/3) + .4 log(4/3) = .554518 - .219722 + .115073
        "tail": 0.449868,
        # .4 log 4 + .2 log(1/3)
        "plain": 0.334795,
    }
    for form, value in expected.items():
        loss = TopK(divergence=ReverseKL(), form=form, biased=form == "plain")(*make(), 0.0)
        assert loss.value[0].tolist() == pytest.approx([value, value, 0.0], abs=2e-6)
        assert loss.weight.tolist() == [[1, 1, 0]]
        assert loss.metrics["divergence"].equal(loss.value)
        assert not loss.metrics["divergence"].requires_grad


@forms
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "divergence", [ReverseKL(), ForwardKL(), JSD(beta=0.5), Skewed(alpha=0.1, direction="reverse")]
)
def test_padding_and_duplicates_do_not_matter(form, garbage, divergence):
    """Neither places without a token nor entries that do not exist, in value or gradient."""
    estimator = TopK(divergence=divergence, form=form, biased=form == "plain")
    scores, experience = make()
    expected = estimator(scores, experience, 0.0)
    expected.value.sum().backward()
    gone = ~(experience.support_valid & MASK.unsqueeze(-1))
    student = scores.support_logp.detach().masked_fill(gone, garbage).requires_grad_()
    teacher = experience.support_teacher_logp.masked_fill(gone, garbage)
    got = estimator(Scores(support_logp=student), replace(experience, support_teacher_logp=teacher), 0.0)
    got.value.sum().backward()
    assert got.value.equal(expected.value)
    assert student.grad.equal(scores.support_logp.grad)
    assert (student.grad[gone] == 0).all()


@forms
def test_only_sampled_tokens_count(form):
    origin = torch.tensor([[Origin.STUDENT, Origin.TEACHER, Origin.STUDENT]])
    loss = TopK(divergence=ReverseKL(), form=form, biased=form == "plain")(*make(origin=origin), 0.0)
    assert loss.weight.tolist() == [[1, 0, 0]]
    assert loss.value[0, 1] == 0


def test_full_support_reads_the_scores():
    _, experience = make()
    experience = replace(experience, teacher_hidden=torch.zeros(1, 3, 2), support_ids=None)
    value = torch.tensor([[0.5, 0.25, float("nan")]], requires_grad=True)
    scores = Scores(full={FullTerm("teacher", ReverseKL()): value})
    loss = TopK(divergence=ReverseKL())(scores, experience, 0.0)
    assert loss.value.tolist() == [[0.5, 0.25, 0.0]]
    loss.value.sum().backward()
    assert value.grad.tolist() == [[1.0, 1.0, 0.0]]
    with pytest.raises(ValueError, match="must hold the divergence"):
        TopK(divergence=ReverseKL())(Scores(), experience, 0.0)


@forms
def test_nothing_sampled(form):
    """numerics 11.24."""
    scores, experience = make(mask=torch.zeros(1, 3, dtype=torch.bool))
    loss = TopK(divergence=ReverseKL(), form=form, biased=form == "plain")(scores, experience, 0.0)
    assert (loss.value == 0).all()
    loss.value.sum().backward()
    assert (scores.support_logp.grad == 0).all()


def test_declares_what_it_needs():
    for form in FORMS:
        estimator = TopK(divergence=ReverseKL(), form=form, biased=form == "plain")
        want = "renormalised" if form == "renormalised" else "exact"
        assert estimator.needs == Needs(support=True, least_support=1 if form == "plain" else 2)
        assert estimator.want == Want(support=want, full=frozenset({FullTerm("teacher", ReverseKL())}))
    tail = TopK(divergence=ReverseKL(), form="tail", biased=True)
    assert tail.needs == Needs(support=True, least_support=1)


def test_refusals():
    estimator = TopK(divergence=ReverseKL())
    _, experience = make()
    nothing = {"support_ids": None, "support_valid": None, "support_teacher_logp": None}
    with pytest.raises(ConfigError, match=r"must have a support.*use support=teacher"):
        estimator(Scores(), replace(experience, **nothing), 0.0)
    with pytest.raises(ConfigError, match=r"must have a support.*use support=teacher"):
        estimator(*make((), (), ()), 0.0)
    with pytest.raises(
        ConfigError, match=r"at least 2 for a renormalised support.*got 1; use estimator.form=tail"
    ):
        estimator(*make((0.5,), (0.3,), (True,)), 0.0)
    one = TopK(divergence=ReverseKL(), form="tail")(*make((0.5,), (0.3,), (True,)), 0.0)
    assert one.value[0, 0] > 0
    with pytest.raises((ConfigError, TypeCheckError), match="form"):
        TopK(divergence=ReverseKL(), form="raw")
    for beta in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=r"`divergence.beta` must be in \[0, 1\]"):
            JSD(beta=beta)
    for alpha in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"`divergence.alpha` must be in \[0, 1\)"):
            Skewed(alpha=alpha, direction="reverse")
    with pytest.raises((ConfigError, TypeCheckError), match="direction"):
        Skewed(alpha=0.1, direction="both")
