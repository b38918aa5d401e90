"""Head and sampled tail (variants V4 and V5) by enumeration of the taken token."""

import pytest
import torch
from jaxtyping import TypeCheckError

from opd_lightning.functional.divergence import reverse_kl
from opd_lightning.functional.ratio import importance_weight
from opd_lightning.functional.tail import head_with_sampled_tail

VOCAB, K = 6, 2
CORRECTIONS = ("none", "plus_one", "generalised")


class Position:
    """One prefix; on a support, the estimate for every token that might be taken."""

    def __init__(self, choose):
        draw = torch.Generator().manual_seed(4)
        student, teacher, behavior = torch.randn(3, VOCAB, generator=draw, dtype=torch.float64) * 1.3
        self.logits = student.requires_grad_()
        self.student, self.teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        self.behavior = behavior.log_softmax(-1)
        self.ids = (self.student if choose == "student" else self.teacher).topk(K).indices
        self.inside = torch.tensor([v in self.ids for v in range(VOCAB)])
        self.full = reverse_kl(self.student, self.teacher)
        self.mass = self.student[self.ids].exp().sum()
        self.teacher_mass = self.teacher[self.ids].exp().sum()

    def estimate(self, correction, **changed):
        rows = {
            "student_logp": self.student[self.ids].expand(VOCAB, K),
            "teacher_logp": self.teacher[self.ids].expand(VOCAB, K),
            "valid": torch.ones(VOCAB, K, dtype=torch.bool),
            "taken_student_logp": self.student,
            "taken_teacher_logp": self.teacher,
            "taken_in_support": self.inside,
        }
        return head_with_sampled_tail(**(rows | changed), correction=correction)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]


@pytest.fixture(params=["student", "teacher"], ids=["V4", "V5"])
def position(request):
    return Position(request.param)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def mean(values, logp):
    return (logp.detach().exp() * values).sum()


# numerics 11.6
def test_as_published(position):
    """E[value] = RKL, E[grad] = grad RKL + grad P_S."""
    got = mean(position.estimate("none"), position.student)
    close(got, position.full)
    pushed_out = position.gradient(position.mass)
    assert pushed_out.abs().max() > 0.05
    close(position.gradient(got), position.gradient(position.full) + pushed_out)


# numerics 11.6
@pytest.mark.parametrize("correction", ["plus_one", "generalised"])
def test_corrected(correction, position):
    """E[grad] = grad RKL, and the values that the docstring names."""
    got = mean(position.estimate(correction), position.student)
    extra = position.teacher_mass - position.mass if correction == "generalised" else 0.0
    close(got, position.full + extra)
    close(position.gradient(got), position.gradient(position.full))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_each_token_by_hand(correction, position):
    s, t = position.student.detach().exp(), position.teacher.exp()
    head = (s * (s / t).log())[position.ids].sum()
    if correction == "generalised":
        head = head + t[position.ids].sum() - s[position.ids].sum()
    expected = head + torch.where(position.inside, 0.0, (s / t).log())
    close(position.estimate(correction).detach(), expected, atol=1e-12)


# numerics 11.16
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_weight_makes_up_for_another_sampler(correction, position):
    """y ~ mu with w = S / mu has the mean of y ~ S, value and gradient; the weight itself is held fixed."""
    weight = (position.student - position.behavior).exp()
    got = mean(position.estimate(correction, weight=weight), position.behavior)
    expected = mean(position.estimate(correction), position.student)
    close(got, expected)
    close(position.gradient(got), position.gradient(expected))
    unweighted = mean(position.estimate(correction), position.behavior)
    assert (position.gradient(unweighted) - position.gradient(expected)).abs().max() > 0.01
    capped = importance_weight(position.student, position.behavior, cap=1.0)
    plain = position.estimate(correction)
    value = position.estimate(correction, weight=capped)
    assert value[position.inside].equal(plain[position.inside])
    assert not value.equal(plain)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_teacher_and_support_are_held_fixed(correction, position):
    teacher = position.teacher.clone().requires_grad_()
    changed = {"teacher_logp": teacher[position.ids].expand(VOCAB, K), "taken_teacher_logp": teacher}
    value = position.estimate(correction, **changed).sum()
    assert torch.autograd.grad(value, teacher, allow_unused=True)[0] is None


# numerics 11.24
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_what_does_not_exist_does_not_matter(correction, garbage, position):
    """Neither an id that is not valid nor what is given of a taken token that the head holds already."""
    expected = position.estimate(correction)
    bad = torch.full((VOCAB, 1), garbage, dtype=torch.float64)
    taken = torch.where(position.inside, garbage, position.student)
    got = position.estimate(
        correction,
        student_logp=torch.cat([position.student[position.ids].expand(VOCAB, K), bad], -1),
        teacher_logp=torch.cat([position.teacher[position.ids].expand(VOCAB, K), bad], -1),
        valid=torch.tensor([True] * K + [False]).expand(VOCAB, -1),
        taken_student_logp=taken,
        taken_teacher_logp=torch.where(position.inside, garbage, position.teacher),
        weight=torch.where(position.inside, garbage, 1.0),
    )
    close(got, expected, atol=1e-12)
    close(position.gradient(got.sum()), position.gradient(expected.sum()), atol=1e-12)


# numerics 11.24
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_nothing_at_all(correction, position):
    """Padding: no valid id, and the taken token counts as listed."""
    nobody = torch.zeros(VOCAB, K, dtype=torch.bool)
    value = position.estimate(correction, valid=nobody, taken_in_support=torch.ones(VOCAB, dtype=torch.bool))
    assert (value == 0).all()
    assert (position.gradient(value.sum()) == 0).all()


# numerics 11.24
def test_a_token_that_the_teacher_excludes_is_finite(position):
    teacher = torch.where(position.inside, position.teacher, -float("inf"))
    value = position.estimate("plus_one", taken_teacher_logp=teacher)
    assert value.isfinite().all()
    assert position.gradient(value.sum()).isfinite().all()


# numerics 11.28
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_half_precision_is_computed_in_float32(correction, position):
    def rows(dtype):
        student = position.student.detach().to(torch.bfloat16).to(dtype)
        teacher = position.teacher.to(torch.bfloat16).to(dtype)
        return {
            "student_logp": student[position.ids].expand(VOCAB, K),
            "teacher_logp": teacher[position.ids].expand(VOCAB, K),
            "taken_student_logp": student,
            "taken_teacher_logp": teacher,
        }

    got = position.estimate(correction, **rows(torch.bfloat16))
    assert got.dtype == torch.float32
    expected = position.estimate(correction, **rows(torch.float64))
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


def test_refuses_another_word(position):
    # Where annotations are checked at run time, they refuse the word first.
    with pytest.raises((ValueError, TypeCheckError), match="correction"):
        position.estimate("some")
