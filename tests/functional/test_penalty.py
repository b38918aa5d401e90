"""Penalties on the taken token: what each says on average, and what it teaches when differentiated."""

import math

import pytest
import torch

from opd_lightning.functional.divergence import forward_kl, reverse_kl
from opd_lightning.functional.penalty import PENALTIES, absolute, k1, k2, k3

VOCAB = 6


@pytest.fixture
def models():
    """Student logits (with gradient) and both models' log-probs of every token."""
    draw = torch.Generator().manual_seed(1)
    logits, teacher = torch.randn(2, VOCAB, generator=draw, dtype=torch.float64) * 1.5
    logits.requires_grad_()
    return logits, logits.log_softmax(-1), teacher.log_softmax(-1)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def mean(values, student):
    """Over y ~ S by enumeration; the draw itself is not differentiated."""
    return (student.detach().exp() * values).sum()


def test_known_numbers():
    # S = 1/2, T = 1/4: d = log 2 = .693147, d^2 / 2 = .2402265, rho = 1/2, rho + d - 1 = .193147
    student, teacher = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    expected = {"k1": 0.693147, "k2": 0.2402265, "k3": 0.193147, "absolute": 0.693147}
    assert {name: f(student, teacher).item() for name, f in PENALTIES.items()} == pytest.approx(expected)
    assert k1(teacher, student).item() == pytest.approx(-0.693147)
    assert absolute(teacher, student).item() == pytest.approx(0.693147)
    # rho = 2: 2 - log 2 - 1
    assert k3(teacher, student).item() == pytest.approx(1 - math.log(2))


# numerics 11.1
def test_values(models):
    """k1 and k3 are unbiased for KL(S||T), k2 is not; only k1 may be negative."""
    _, student, teacher = models
    kl = reverse_kl(student, teacher)
    close(mean(k1(student, teacher), student), kl)
    close(mean(k3(student, teacher), student), kl)
    assert (mean(k2(student, teacher), student) - kl).abs() > 0.1
    assert k1(student, teacher).min() < 0
    for penalty in (k2, k3, absolute):
        assert penalty(student, teacher).min() >= 0


# numerics 11.1
def test_k1_as_an_advantage_is_reverse_kl(models):
    logits, student, teacher = models
    loss = mean(k1(student, teacher).detach() * student, student)
    close(gradient(loss, logits), gradient(reverse_kl(student, teacher), logits))


# numerics 11.1
def test_k1_directly_is_nothing(models):
    logits, student, teacher = models
    close(gradient(mean(k1(student, teacher), student), logits), torch.zeros_like(logits), atol=1e-15)


# numerics 11.1
def test_k2_directly_is_reverse_kl(models):
    logits, student, teacher = models
    got = gradient(mean(k2(student, teacher), student), logits)
    close(got, gradient(reverse_kl(student, teacher), logits))


# numerics 11.1
def test_k3_directly_is_forward_kl(models):
    logits, student, teacher = models
    got = gradient(mean(k3(student, teacher), student), logits)
    close(got, gradient(forward_kl(student, teacher), logits))
    assert (got - gradient(reverse_kl(student, teacher), logits)).abs().max() > 0.01


# numerics 11.1
def test_absolute_directly_is_the_sign(models):
    """sum_y S_y sign_y (onehot(y) - S): the gradient neither of a KL nor of total variation."""
    logits, student, teacher = models
    s, sign = student.detach().exp(), (student - teacher).detach().sign()
    close(gradient(mean(absolute(student, teacher), student), logits), s * (sign - (s * sign).sum()))


def test_a_clamp_cuts_the_gradient_on_both_sides():
    """numerics.md section 2: at 10 it is gone above rho = 13.6 and below 1.7e-5."""
    for rho, alive in ((13.5, True), (13.7, False), (1.8e-5, True), (1.6e-5, False)):
        d = torch.tensor(-math.log(rho), dtype=torch.float64, requires_grad=True)
        penalty = k3(d, torch.zeros_like(d), clamp=10.0)
        assert (penalty < 10) == alive
        # d/dd (e^-d + d - 1)
        expected = 1 - rho if alive else 0.0
        assert torch.autograd.grad(penalty, d)[0].item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="clamp must be positive, got 0"):
        k3(d, d, clamp=0.0)


@pytest.mark.parametrize("clamp", [None, 10.0])
def test_k3_of_an_impossible_token_is_finite(clamp):
    student = torch.tensor([-300.0, -19.0], requires_grad=True)
    penalty = k3(student, torch.zeros(2), clamp=clamp)
    penalty.sum().backward()
    assert penalty.isfinite().all()
    assert student.grad.isfinite().all()
    assert student.grad[0] == 0
    assert (student.grad[1] != 0) == (clamp is None)


# numerics 11.17
@pytest.mark.parametrize("name", PENALTIES)
def test_equal_models_give_zero_and_no_gradient(name, models):
    logits, student, teacher = models
    penalty = PENALTIES[name](student, student.detach())
    assert (penalty == 0).all()
    close(gradient(mean(penalty, student), logits), torch.zeros_like(logits), atol=1e-15)
    s, t = student.detach(), teacher.clone().requires_grad_()
    assert (torch.autograd.grad(PENALTIES[name](s, t).sum(), t)[0] != 0).all()


# numerics 11.28
@pytest.mark.parametrize("name", PENALTIES)
def test_half_precision_is_computed_in_float32(name, models):
    _, student, teacher = (m.detach().to(torch.bfloat16) for m in models)
    got = PENALTIES[name](student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), PENALTIES[name](student.double(), teacher.double()), atol=1e-6, rtol=1e-5
    )
