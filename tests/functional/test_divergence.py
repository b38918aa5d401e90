"""Divergences: known numbers, independent references, gradients of numerics.md section 1, what must not matter."""

import math
from functools import partial

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.distributions import Categorical, kl_divergence

from opd_lightning.functional.divergence import (
    forward_kl,
    generalised_forward_kl,
    generalised_reverse_kl,
    jsd,
    reverse_kl,
    skewed,
)

EVERY = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd .5": partial(jsd, beta=0.5),
    "jsd .2": partial(jsd, beta=0.2),
    "jsd .2 scaled": partial(jsd, beta=0.2, scaled=True),
    "skewed forward": partial(skewed, alpha=0.1, direction="forward"),
    "skewed reverse": partial(skewed, alpha=0.1, direction="reverse"),
    "generalised_reverse_kl": generalised_reverse_kl,
    "generalised_forward_kl": generalised_forward_kl,
}
every = pytest.mark.parametrize("divergence", EVERY.values(), ids=EVERY.keys())


def pair(*shape, seed=0, dtype=torch.float64):
    """Logits of a student (with gradient) and a teacher."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=draw, dtype=torch.float64) * 1.5
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


# Student (1/2, 1/2), teacher (1/4, 3/4).
KNOWN = {
    # .5 log(.5/.25) + .5 log(.5/.75) = .5 log 2 - .5 log 1.5 = .346574 - .202733
    "reverse_kl": 0.143841,
    # .25 log(.25/.5) + .75 log(.75/.5) = -.173287 + .304099
    "forward_kl": 0.130812,
    # M = (3/8, 5/8); KL(T||M) = .25 log(2/3) + .75 log(6/5) = -.101366 + .136741 = .035375;
    # KL(S||M) = .5 log(4/3) + .5 log(4/5) = .143841 - .111572 = .032269; .5 * (.035375 + .032269)
    "jsd .5": 0.033822,
    # M = .2 T + .8 S = (.45, .55); KL(T||M) = .25 log(.25/.45) + .75 log(.75/.55) = -.146947 + .232616
    # = .085669; KL(S||M) = .5 log(.5/.45) + .5 log(.5/.55) = .052680 - .047655 = .005025;
    # .2 * .085669 + .8 * .005025
    "jsd .2": 0.021154,
    # .021154 / (.2 * .8)
    "jsd .2 scaled": 0.132212,
    # M = .1 T + .9 S = (.475, .525); .25 log(.25/.475) + .75 log(.75/.525) = -.160463 + .267506
    "skewed forward": 0.107043,
    # M = .1 S + .9 T = (.275, .725); .5 log(.5/.275) + .5 log(.5/.725) = .298918 - .185782
    "skewed reverse": 0.113137,
    # Both rows sum to 1: nothing is added.
    "generalised_reverse_kl": 0.143841,
    "generalised_forward_kl": 0.130812,
}


@pytest.mark.parametrize("name", EVERY)
def test_known_numbers(name):
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert EVERY[name](student, teacher).item() == pytest.approx(KNOWN[name], abs=2e-6)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 7)])
def test_kl_equals_torch_distributions(shape):
    s, t = pair(*shape)
    student, teacher = s.log_softmax(-1), t.log_softmax(-1)
    assert reverse_kl(student, teacher).shape == shape[:-1]
    expected = kl_divergence(Categorical(logits=s), Categorical(logits=t))
    torch.testing.assert_close(reverse_kl(student, teacher), expected)
    expected = kl_divergence(Categorical(logits=t), Categorical(logits=s))
    torch.testing.assert_close(forward_kl(student, teacher), expected)


@pytest.mark.parametrize("beta", [0.001, 0.3, 0.5, 0.9])
def test_jsd_equals_a_loop(beta):
    s, t = pair(6)
    p, q = s.softmax(-1).tolist(), t.softmax(-1).tolist()
    m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    of_teacher = sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
    of_student = sum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
    got = jsd(s.log_softmax(-1), t.log_softmax(-1), beta=beta)
    assert got.item() == pytest.approx(beta * of_teacher + (1 - beta) * of_student, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
def test_skewed_equals_torch_distributions(alpha):
    s, t = pair(4, 6)
    p, q = s.softmax(-1), t.softmax(-1)
    student, teacher = s.log_softmax(-1), t.log_softmax(-1)
    expected = kl_divergence(Categorical(q), Categorical(alpha * q + (1 - alpha) * p))
    got = skewed(student, teacher, alpha=alpha, direction="forward")
    torch.testing.assert_close(got, expected)
    expected = kl_divergence(Categorical(p), Categorical(alpha * p + (1 - alpha) * q))
    got = skewed(student, teacher, alpha=alpha, direction="reverse")
    torch.testing.assert_close(got, expected)


# numerics 11.7
def test_jsd_ends_by_name_and_by_limit():
    s, t = pair(8)
    student, teacher = s.log_softmax(-1), t.log_softmax(-1)
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    assert jsd(student, teacher, beta=0.0) == forward
    assert jsd(student, teacher, beta=1.0) == reverse
    # A jump and no limit: close to the ends the value vanishes in proportion.
    tiny = 1e-7
    assert jsd(student, teacher, beta=tiny).item() / tiny == pytest.approx(forward.item(), rel=1e-5)
    assert jsd(student, teacher, beta=1 - tiny).item() / tiny == pytest.approx(reverse.item(), rel=1e-5)
    torch.testing.assert_close(jsd(student, teacher, beta=0.5), jsd(teacher, student, beta=0.5))
    assert jsd(student, teacher, beta=0.3) != jsd(teacher, student, beta=0.3)


# numerics 11.7
def test_scaled_jsd_runs_from_one_kl_to_the_other():
    s, t = pair(8)
    scaled = partial(jsd, s.log_softmax(-1), t.log_softmax(-1), scaled=True)
    forward, reverse = scaled(beta=0.0).item(), scaled(beta=1.0).item()
    assert scaled(beta=1e-7).item() == pytest.approx(forward, rel=1e-5)
    assert scaled(beta=1 - 1e-7).item() == pytest.approx(reverse, rel=1e-5)
    assert abs(forward - reverse) > 0.02


def test_jsd_is_bounded_by_the_entropy_of_beta():
    student = torch.tensor([1.0, 0.0], dtype=torch.float64).log()
    teacher = torch.tensor([0.0, 1.0], dtype=torch.float64).log()
    for beta in (0.1, 0.5):
        # Disjoint: KL(T||M) = -log beta, KL(S||M) = -log(1 - beta).
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert jsd(student, teacher, beta=beta).item() == pytest.approx(bound, rel=1e-12)


def section_1(name, s, t):
    """The gradients by hand, from probabilities."""
    if name.endswith("forward_kl"):
        return s - t
    if name.endswith("reverse_kl"):
        ratio = (s / t).log()
        return s * (ratio - (s * ratio).sum(-1, keepdim=True))
    if name.startswith("jsd"):
        beta = float(name.split()[1])
        ratio = (s / (beta * t + (1 - beta) * s)).log()
        scale = 1 / beta / (1 - beta) if name.endswith("scaled") else 1
        return scale * (1 - beta) * s * (ratio - (s * ratio).sum(-1, keepdim=True))
    if name == "skewed forward":
        a = 0.9 * t / (0.1 * t + 0.9 * s)
        return s * ((s * a).sum(-1, keepdim=True) - a)
    mixture = 0.1 * s + 0.9 * t
    h = (s / mixture).log() - 0.1 * s / mixture
    return s * (h - (s * h).sum(-1, keepdim=True))


# numerics 11.2
@pytest.mark.parametrize("name", EVERY)
def test_gradient_by_the_table(name):
    """The gradients of section 1 with respect to the student's logits."""
    s, t = pair(3, 6)
    EVERY[name](s.log_softmax(-1), t.log_softmax(-1)).sum().backward()
    expected = section_1(name, s.detach().softmax(-1), t.softmax(-1))
    torch.testing.assert_close(s.grad, expected, atol=1e-12, rtol=0)


# numerics 11.17
@every
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_scales_the_gradient(divergence, temperature):
    """Gradients are 1/tau times those at the divided logits."""
    s, t = pair(4, 6)
    divergence((s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)).sum().backward()
    cooled = (s.detach() / temperature).requires_grad_()
    divergence(cooled.log_softmax(-1), (t / temperature).log_softmax(-1)).sum().backward()
    torch.testing.assert_close(s.grad, cooled.grad / temperature)
    same = (t / temperature).log_softmax(-1)
    torch.testing.assert_close(divergence(same, same), torch.zeros(4, dtype=torch.float64))


@every
def test_equal_models_give_zero_and_no_gradient(divergence):
    _, t = pair(5, 9)
    s = t.clone().requires_grad_()
    value = divergence(s.log_softmax(-1), t.log_softmax(-1))
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-15, rtol=0)
    torch.testing.assert_close(s.grad, torch.zeros_like(t), atol=1e-15, rtol=0)


@every
def test_is_positive_and_differentiates_into_the_teacher_too(divergence):
    s, t = pair(50, 4)
    t.requires_grad_()
    value = divergence(s.log_softmax(-1), t.log_softmax(-1))
    assert (value > 0).all()
    value.sum().backward()
    assert t.grad.abs().sum() > 0


@every
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 3.0])
def test_what_is_not_valid_does_not_matter(divergence, garbage):
    s, t = pair(2, 5)
    valid = torch.tensor([[True, True, False, True, False], [False] * 5])
    student, teacher = s.log_softmax(-1).detach(), t.log_softmax(-1)
    kept_s, kept_t = student[:1, [0, 1, 3]].requires_grad_(), teacher[:1, [0, 1, 3]]
    expected = divergence(kept_s, kept_t)
    expected.sum().backward()

    student = student.masked_fill(~valid, garbage).requires_grad_()
    teacher = teacher.masked_fill(~valid, garbage)
    value = divergence(student, teacher, valid)
    value.sum().backward()
    torch.testing.assert_close(value, torch.cat([expected, torch.zeros(1, dtype=torch.float64)]))
    assert value[1] == 0
    assert (student.grad[~valid] == 0).all()
    torch.testing.assert_close(student.grad[0, [0, 1, 3]], kept_s.grad[0])


# numerics 11.24
@every
@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_probabilities_stay_finite(divergence, zero, dtype):
    """Categories that one or both of the models exclude."""
    s, t = pair(4, 5, dtype=dtype)
    block = torch.zeros(5, dtype=dtype)
    block[2] = -float("inf")
    student = s + block if zero != "teacher" else s + 0
    teacher = t + block if zero != "student" else t
    value = divergence(student.log_softmax(-1), teacher.log_softmax(-1))
    value.sum().backward()
    assert value.isfinite().all()
    assert s.grad.isfinite().all()
    if zero == "both":  # The category is gone from both sides: nothing is left of it.
        keep = [0, 1, 3, 4]
        expected = divergence(s[:, keep].log_softmax(-1), t[:, keep].log_softmax(-1))
        torch.testing.assert_close(value, expected)


# numerics 11.24
def test_one_hot_teacher():
    """KL(T||S) is the cross-entropy -log S(v)."""
    s, _ = pair(5)
    teacher = torch.full((5,), -float("inf"), dtype=torch.float64)
    teacher[3] = 0.0
    value = forward_kl(s.log_softmax(-1), teacher)
    torch.testing.assert_close(value, -s.log_softmax(-1)[3])
    assert reverse_kl(s.log_softmax(-1), teacher).item() > 100


# numerics 11.28
@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computes_in_float32_or_more(divergence, dtype):
    """Half-precision inputs, float32 arithmetic."""
    s, t = pair(6, 8)
    student, teacher = s.detach().log_softmax(-1).to(dtype), t.log_softmax(-1).to(dtype)
    value = divergence(student, teacher)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        value.double(), divergence(student.double(), teacher.double()), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_jsd_refuses_other_betas(beta):
    with pytest.raises(ValueError, match="beta must be in"):
        jsd(torch.zeros(2), torch.zeros(2), beta=beta)


def test_skewed_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="alpha must be in"):
        skewed(torch.zeros(2), torch.zeros(2), alpha=1.0, direction="reverse")
    # Where annotations are checked at run time, they refuse the word first.
    with pytest.raises((ValueError, TypeCheckError), match="direction"):
        skewed(torch.zeros(2), torch.zeros(2), alpha=0.5, direction="backward")
