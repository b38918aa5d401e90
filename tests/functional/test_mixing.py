"""Samplers between two models, against grids and closed forms in float64."""

import math

import pytest
import torch

from opd_lightning.functional.mixing import bounded_geometric_mix, geometric_mix, linear_mix


def pair(rows=40, vocab=12, spread=2.0, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(2, rows, vocab, generator=random, dtype=dtype)
    student, teacher = logits.log_softmax(-1)
    return student, teacher


def kl(mu, student):
    return (mu.exp() * (mu - student)).sum(-1)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_linear_is_the_weighted_mean_of_probabilities(alpha):
    student, teacher = pair()
    want = alpha * teacher.exp() + (1 - alpha) * student.exp()
    assert torch.allclose(linear_mix(student, teacher, alpha).exp(), want, atol=1e-12, rtol=0)


def test_linear_bounds_the_students_weights():
    student, teacher = pair(spread=6.0)
    assert (student - linear_mix(student, teacher, 0.2)).exp().max() <= 1 / 0.8 + 1e-9


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_geometric_is_the_normalised_product_of_powers(beta):
    student, teacher = pair()
    product = student.exp() ** (1 - beta) * teacher.exp() ** beta
    want = product / product.sum(-1, keepdim=True)
    assert torch.allclose(geometric_mix(student, teacher, beta).exp(), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5, 2.0])
def test_the_bound_holds_and_is_reached_unless_the_teacher_is_inside(epsilon):
    student, teacher = pair(rows=200)
    mu = bounded_geometric_mix(student, teacher, epsilon)
    distance, whole = kl(mu, student), kl(teacher, student)
    assert (distance <= epsilon + 1e-9).all()
    inside = whole <= epsilon
    assert torch.allclose(mu[inside], teacher[inside], atol=1e-12)
    assert torch.allclose(distance[~inside], torch.tensor(epsilon, dtype=torch.float64), atol=1e-5)
    if epsilon == 2.0:
        assert 0 < int(inside.sum()) < 200  # both cases are there


def test_the_exponent_is_the_largest_of_a_fine_grid():
    student, teacher = pair(rows=5, seed=3)
    mu = bounded_geometric_mix(student, teacher, 0.2)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    for s, t, got in zip(student, teacher, mu, strict=True):
        mixed = geometric_mix(s.expand(len(grid), -1), t.expand(len(grid), -1), grid[:, None])
        distance = kl(mixed, s)
        assert (distance.diff() >= -1e-12).all()  # it grows, so that bisection finds the largest
        best = int((distance <= 0.2).nonzero()[-1])
        assert torch.allclose(got.exp(), mixed[best].exp(), atol=1e-3)


def test_epsilon_0_is_the_student_and_a_huge_one_the_teacher():
    student, teacher = pair(dtype=torch.float32)
    assert torch.equal(bounded_geometric_mix(student, teacher, 0.0), student)
    assert torch.allclose(bounded_geometric_mix(student, teacher, 1e9), teacher, atol=1e-6)


def test_rows_have_exponents_of_their_own():
    student, teacher = pair()
    whole = bounded_geometric_mix(student, teacher, 0.3)
    alone = torch.cat([bounded_geometric_mix(student[i : i + 1], teacher[i : i + 1], 0.3) for i in range(40)])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_least_float32_over_many_ids(dtype):
    student, teacher = (x.to(dtype) for x in pair(rows=50, vocab=5000))
    student, teacher = student.float().log_softmax(-1), teacher  # bfloat16 log-probs do not sum to 1
    mu = bounded_geometric_mix(student, teacher, 0.3)
    assert mu.dtype == torch.float32
    assert (kl(mu.double(), student.double()) <= 0.3 + 1e-4).all()
    assert torch.allclose(mu.exp().sum(-1), torch.ones(50), atol=1e-5)


def test_zero_probabilities_give_no_nan():
    student = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    teacher = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]).log()
    for mu in (
        linear_mix(student, teacher, 0.2),
        geometric_mix(student, teacher, 0.5),
        bounded_geometric_mix(student, teacher, 0.3),
    ):
        assert torch.isfinite(mu).all()
        assert torch.allclose(mu.exp().sum(-1), torch.ones(2), atol=1e-6)
    assert float(linear_mix(student, teacher, 0.2)[0, 2]) == pytest.approx(math.log(0.1), abs=1e-5)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_refusals(value):
    student, teacher = pair()
    with pytest.raises(ValueError, match="alpha"):
        linear_mix(student, teacher, value)
    if value != 1.1:
        with pytest.raises(ValueError, match="epsilon"):
            bounded_geometric_mix(student, teacher, value)
