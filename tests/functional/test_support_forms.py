"""The three forms of a support: numerics.md section 3, table by table."""

import math
from itertools import pairwise

import pytest
import torch

from opd_lightning.functional.divergence import (
    FORMS,
    LOG_ZERO,
    forward_kl,
    jsd,
    log_mass,
    plain,
    renormalise,
    reverse_kl,
    skewed,
    with_tail,
)

VOCAB, SUPPORT = 7, [1, 2, 5]


@pytest.fixture
def models():
    """Student logits (with gradient) and the two distributions."""
    draw = torch.Generator().manual_seed(3)
    logits, teacher = torch.randn(2, VOCAB, generator=draw, dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.detach().softmax(-1), teacher.softmax(-1)


def valid(n=len(SUPPORT)):
    return torch.ones(n, dtype=torch.bool)


def gradient(logits, form, divergence, teacher):
    student = logits.log_softmax(-1)[SUPPORT]
    value = divergence(form(student, valid()), form(teacher.log()[SUPPORT], valid()))
    return value.detach(), torch.autograd.grad(value, logits)[0]


def scattered(values):
    return torch.zeros(VOCAB, dtype=torch.float64).index_copy(0, torch.tensor(SUPPORT), values)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_known_numbers():
    logp = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    assert log_mass(logp).item() == pytest.approx(math.log(0.75))
    close(renormalise(logp).exp(), torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    close(with_tail(logp).exp(), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    close(plain(logp, valid(2)), logp)
    assert list(FORMS.items()) == [("renormalised", renormalise), ("tail", with_tail), ("plain", plain)]


# numerics 11.3
def test_renormalised_gradients(models):
    logits, s, t = models
    s_hat, t_hat = s[SUPPORT] / s[SUPPORT].sum(), t[SUPPORT] / t[SUPPORT].sum()
    ratio = (s_hat / t_hat).log()
    value, got = gradient(logits, renormalise, reverse_kl, t)
    close(value, (s_hat * ratio).sum())
    close(got, scattered(s_hat * (ratio - value)))
    value, got = gradient(logits, renormalise, forward_kl, t)
    close(value, (t_hat * (t_hat / s_hat).log()).sum())
    close(got, scattered(s_hat - t_hat))
    outside = [v for v in range(VOCAB) if v not in SUPPORT]
    assert got[outside].abs().max() < 1e-16


# numerics 11.3
def test_renormalised_ignores_a_constant_and_itself(models):
    """Logits, log-probs and renormalised log-probs give the same."""
    logits, _, _ = models
    expected = renormalise(logits.log_softmax(-1)[SUPPORT])
    close(renormalise(logits[SUPPORT] + 12.5), expected)
    close(renormalise(expected), expected)


# numerics 11.3
def test_renormalised_over_one_id_is_nothing(models):
    """Zero at K = 1, and so is the gradient."""
    logits, _, t = models
    value = reverse_kl(renormalise(logits[:1]), renormalise(t.log()[:1]))
    assert value == 0
    assert (torch.autograd.grad(value, logits)[0] == 0).all()


# numerics 11.4
def test_raw_reverse_kl(models):
    """Value, gradients on and off the support, minimiser."""
    logits, s, t = models
    mass_s, mass_t = s[SUPPORT].sum(), t[SUPPORT].sum()
    conditional = reverse_kl(renormalise(s.log()[SUPPORT]), renormalise(t.log()[SUPPORT]))
    value, got = gradient(logits, plain, reverse_kl, t)
    close(value, mass_s * ((mass_s / mass_t).log() + conditional))
    expected = -s * (value + mass_s)
    expected[SUPPORT] = s[SUPPORT] * ((s / t).log()[SUPPORT] + 1 - value - mass_s)
    close(got, expected)

    # The conditional distribution held fixed, the best mass is P_T exp(-(1 + KL_hat)), the value minus that.
    masses = torch.linspace(0.001, 0.999, 99_801, dtype=torch.float64)
    s_hat = s[SUPPORT] / mass_s
    values = reverse_kl((masses.unsqueeze(-1) * s_hat).log(), t.log()[SUPPORT].expand(len(masses), -1))
    best = mass_t * torch.exp(-(1 + conditional))
    assert masses[values.argmin()].item() == pytest.approx(best.item(), abs=1e-4)
    assert values.min().item() == pytest.approx(-best.item(), abs=1e-6)


def test_raw_forward_kl(models):
    """numerics.md section 3: P_T S_j - T_j on the support, P_T S_j off it."""
    logits, s, t = models
    value, got = gradient(logits, plain, forward_kl, t)
    close(value, (t * (t / s).log())[SUPPORT].sum())
    expected = t[SUPPORT].sum() * s
    expected[SUPPORT] -= t[SUPPORT]
    close(got, expected)


# numerics 11.5
def test_tail_gradients(models):
    """Section 3's gradients with the tail as one more category."""
    logits, s, t = models
    off_s, off_t = 1 - s[SUPPORT].sum(), 1 - t[SUPPORT].sum()
    value, got = gradient(logits, with_tail, reverse_kl, t)
    close(value, (s * (s / t).log())[SUPPORT].sum() + off_s * (off_s / off_t).log())
    expected = s * ((off_s / off_t).log() - value)
    expected[SUPPORT] = s[SUPPORT] * ((s / t).log()[SUPPORT] - value)
    close(got, expected)
    _, got = gradient(logits, with_tail, forward_kl, t)
    expected = s - off_t * s / off_s
    expected[SUPPORT] = (s - t)[SUPPORT]
    close(got, expected)


# numerics 11.5
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_tail_grows_with_the_support_up_to_the_whole(models, divergence):
    """Monotone, below the full KL, equal to it at K = V - 1."""
    logits, s, t = models
    whole = divergence(s.log(), t.log())
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    values = [
        divergence(with_tail(s.log()[order[:k]]), with_tail(t.log()[order[:k]])) for k in range(1, VOCAB)
    ]
    assert all(a <= b + 1e-12 for a, b in pairwise(values))
    assert all(0 <= v <= whole + 1e-12 for v in values)
    close(values[-1], whole)
    (expected,) = torch.autograd.grad(divergence(logits.log_softmax(-1), t.log()), logits)
    student = with_tail(logits.log_softmax(-1)[order[:-1]])
    (got,) = torch.autograd.grad(divergence(student, with_tail(t.log()[order[:-1]])), logits)
    close(got, expected)


# numerics 11.2
@pytest.mark.parametrize("form", FORMS)
def test_the_whole_vocabulary_as_support_is_the_full_divergence(models, form):
    """At K = V, for every divergence."""
    logits, s, t = models
    change, everything = FORMS[form], torch.ones(VOCAB, dtype=torch.bool)
    for divergence in (
        reverse_kl,
        forward_kl,
        lambda a, b: jsd(a, b, beta=0.3),
        lambda a, b: skewed(a, b, alpha=0.1, direction="reverse"),
        lambda a, b: skewed(a, b, alpha=0.1, direction="forward"),
    ):
        expected = divergence(logits.log_softmax(-1), t.log())
        student = change(logits.log_softmax(-1), everything)
        got = divergence(student, change(t.log(), everything))
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
        a, b = (torch.autograd.grad(v, logits)[0] for v in (got, expected))
        torch.testing.assert_close(a, b, atol=1e-7 if form == "tail" else 1e-12, rtol=0)
    assert s.sum() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tail_of_a_support_that_holds_everything(dtype):
    """The limit of numerics.md section 3: a tail of 1e-7, log of it about -16.118, without gradient."""
    logits = torch.tensor([40.0, 0.0, -3.0], dtype=dtype, requires_grad=True)
    tail = with_tail(logits.log_softmax(-1))[-1]
    assert tail.item() == pytest.approx(math.log(1e-7), abs=1e-3)
    assert (torch.autograd.grad(tail, logits)[0] == 0).all()
    # Rounding may put a log-mass just above 0, where log1p(-exp(x)) would be NaN.
    assert with_tail(torch.tensor([1e-6], dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 0.5])
def test_entries_that_do_not_exist_do_not_matter(models, form, garbage):
    logits, _, t = models
    change = FORMS[form]
    logp = logits.detach().log_softmax(-1)
    exists = torch.tensor([[v in SUPPORT for v in range(VOCAB)], [False] * VOCAB])
    student = logp.expand(2, -1).masked_fill(~exists, garbage).requires_grad_()
    teacher = change(t.log().expand(2, -1).masked_fill(~exists, garbage), exists)
    value = reverse_kl(change(student, exists), teacher)
    value.sum().backward()
    alone = logp[SUPPORT].requires_grad_()
    expected = reverse_kl(change(alone, valid()), change(t.log()[SUPPORT], valid()))
    expected.backward()
    torch.testing.assert_close(value[0], expected)
    assert value[1] == 0
    torch.testing.assert_close(student.grad[0, SUPPORT], alone.grad)
    assert (student.grad[~exists] == 0).all()
    changed = change(student, exists)[..., :VOCAB]
    assert (changed[~exists] == LOG_ZERO).all()
    torch.testing.assert_close(log_mass(student, exists)[0], logp[SUPPORT].logsumexp(-1))
    assert log_mass(student, exists)[1].exp() == 0


# numerics 11.24
@pytest.mark.parametrize("form", FORMS)
def test_zero_probabilities_on_a_support_stay_finite(form):
    logits = torch.tensor([0.0, 1.0, -float("inf")]).requires_grad_()
    teacher = torch.tensor([0.0, -float("inf"), -float("inf")])
    value = reverse_kl(FORMS[form](logits.log_softmax(-1), valid()), FORMS[form](teacher, valid()))
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


# numerics 11.24
@pytest.mark.parametrize("form", FORMS)
def test_a_support_without_any_probability_stays_finite(form):
    """Every listed id has p = 0, as under a one-hot model elsewhere."""
    nothing = torch.full((3,), -float("inf"), requires_grad=True)
    value = reverse_kl(FORMS[form](nothing, valid()), FORMS[form](torch.tensor([-1.0, -2.0, -3.0]), valid()))
    value.backward()
    assert value.isfinite()
    assert nothing.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_computed_in_float32(form):
    logp = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    got = FORMS[form](logp, valid(2))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), FORMS[form](logp.double(), valid(2)), atol=1e-6, rtol=1e-6)


# numerics 11.28
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.1, 2.0])
def test_bf16_logits_give_no_negative_divergence(form, distance):
    """Reduced in float32: within 1e-6 of float64 on the same inputs, relative beyond 1; near S = T no value below."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 64, generator=draw) * 3.0
    other = logits + distance * torch.randn(500, 64, generator=draw)
    pair = [x.to(torch.bfloat16) for x in (logits, other)]
    count = 64 if form == "plain" else 16  # a raw sum over less than all ids may be negative

    def read(logits, dtype):
        logp = logits.to(dtype).log_softmax(-1)[:, :count]
        return FORMS[form](logp, torch.ones_like(logp, dtype=torch.bool))

    for divergence in (reverse_kl, forward_kl, lambda a, b: jsd(a, b, beta=0.3)):
        got = divergence(*(read(x, torch.float32) for x in pair))
        exact = divergence(*(read(x, torch.float64) for x in pair))
        assert got.dtype == torch.float32
        assert got.min() > -1e-6
        torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=1e-6)


# numerics 11.28
def test_a_softmax_in_bf16_would_break_that_bound():
    """Why the normaliser is summed in float32."""
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(500, 64, generator=draw) * 3.0).to(torch.bfloat16)
    moved = (logits + 0.1 * torch.randn(500, 64, generator=draw)).to(torch.bfloat16)
    assert reverse_kl(logits.log_softmax(-1), moved.log_softmax(-1)).min() < -1e-3
