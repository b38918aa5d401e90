"""Generalised KLs and total variation on a truncated support: numerics.md sections 3 and 4."""

import pytest
import torch

from opd_lightning.functional.divergence import (
    FORMS,
    forward_kl,
    generalised_forward_kl,
    generalised_reverse_kl,
    plain,
    reverse_kl,
    total_variation,
)

VOCAB, SUPPORT = 7, [1, 2, 5]
VALID = torch.ones(len(SUPPORT), dtype=torch.bool)
BOTH = {"reverse": generalised_reverse_kl, "forward": generalised_forward_kl}


@pytest.fixture
def models():
    """Student logits (with gradient) and the two distributions."""
    draw = torch.Generator().manual_seed(3)
    logits, teacher = torch.randn(2, VOCAB, generator=draw, dtype=torch.float64)
    logits.requires_grad_()
    return logits, logits.detach().softmax(-1), teacher.softmax(-1)


def truncated(divergence, logits, teacher):
    student = plain(logits.log_softmax(-1)[SUPPORT], VALID)
    return divergence(student, plain(teacher.log()[SUPPORT], VALID))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


# numerics 11.4
def test_reverse_gradient_by_the_table(models):
    logits, s, t = models
    value = truncated(generalised_reverse_kl, logits, t)
    raw = (s * (s / t).log())[SUPPORT].sum()
    close(value.detach(), raw - s[SUPPORT].sum() + t[SUPPORT].sum())
    expected = -s * raw
    expected[SUPPORT] = (s * ((s / t).log() - raw))[SUPPORT]
    close(torch.autograd.grad(value, logits)[0], expected)


# numerics 11.4
def test_forward_gradient_by_the_table(models):
    logits, s, t = models
    mass_s, mass_t = s[SUPPORT].sum(), t[SUPPORT].sum()
    value = truncated(generalised_forward_kl, logits, t)
    close(value.detach(), (t * (t / s).log())[SUPPORT].sum() - mass_t + mass_s)
    expected = mass_t * s - s * mass_s
    expected[SUPPORT] = (mass_t * s - t + s * (1 - mass_s))[SUPPORT]
    close(torch.autograd.grad(value, logits)[0], expected)


# numerics 11.4
@pytest.mark.parametrize("name", BOTH)
def test_never_negative_where_the_raw_sum_is(name):
    draw = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 2000, VOCAB, generator=draw, dtype=torch.float64) * 2).log_softmax(-1)
    raw = {"reverse": reverse_kl, "forward": forward_kl}[name]
    assert (raw(s[:, SUPPORT], t[:, SUPPORT]) < -0.1).sum() > 100
    assert (BOTH[name](s[:, SUPPORT], t[:, SUPPORT]) > 1e-3).all()


# numerics 11.4
@pytest.mark.parametrize("name", BOTH)
def test_zero_with_zero_gradient_where_both_agree_on_the_support(name, models):
    """Off the support they may differ."""
    logits, s, _ = models
    teacher = s.clone()
    outside = [v for v in range(VOCAB) if v not in SUPPORT]
    teacher[outside] = teacher[outside].flip(0)
    value = truncated(BOTH[name], logits, teacher)
    close(value.detach(), torch.tensor(0.0, dtype=torch.float64))
    close(torch.autograd.grad(value, logits)[0], torch.zeros(VOCAB, dtype=torch.float64))


# numerics 11.4
@pytest.mark.parametrize(
    ("divergence", "best"),
    [
        (generalised_reverse_kl, lambda s, mass_t, kl: mass_t * torch.exp(-kl)),
        (generalised_forward_kl, lambda s, mass_t, kl: mass_t),
    ],
    ids=BOTH,
)
def test_the_best_mass_is_the_teachers(divergence, best, models):
    """With the conditional distribution held fixed: P_T for forward, P_T exp(-KL_hat) for reverse KL.

    Both are P_T where the conditionals agree; the raw sum stays a factor of e below even there.
    """
    _, s, t = models
    s_hat, t_hat, mass_t = s[SUPPORT] / s[SUPPORT].sum(), t[SUPPORT] / t[SUPPORT].sum(), t[SUPPORT].sum()
    masses = torch.linspace(0.001, 0.999, 99_801, dtype=torch.float64).unsqueeze(-1)
    for conditional in (s_hat, t_hat):
        values = divergence((masses * conditional).log(), t.log()[SUPPORT].expand(len(masses), -1))
        expected = best(conditional, mass_t, reverse_kl(conditional.log(), t_hat.log()))
        assert masses[values.argmin()].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("form", ["renormalised", "tail"])
@pytest.mark.parametrize("name", BOTH)
def test_is_the_kl_on_rows_that_hold_all_the_mass(name, form, models):
    logits, _, t = models
    change, plain_kl = FORMS[form], {"reverse": reverse_kl, "forward": forward_kl}[name]
    pair = change(logits.log_softmax(-1)[SUPPORT], VALID), change(t.log()[SUPPORT], VALID)
    got, expected = BOTH[name](*pair), plain_kl(*pair)
    close(got, expected)
    gradients = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (got, expected))
    close(*gradients)


def test_total_variation(models):
    logits, s, t = models
    got = total_variation(logits.log_softmax(-1), t.log())
    # The most that the two can differ on any set of ids is on the ids that the student likes more.
    close(got.detach(), (s - t)[s > t].sum())
    close(got, total_variation(t.log(), logits.log_softmax(-1)))
    close(total_variation(t.log(), t.log()), torch.tensor(0.0, dtype=torch.float64))
    # d/dz_j of 1/2 sum_v |S_v - T_v| by the chain rule, dS_v/dz_j = S_v (1[v = j] - S_j).
    sign = (s - t).sign()
    close(torch.autograd.grad(got, logits)[0], 0.5 * s * (sign - (s * sign).sum()))
    valid = torch.tensor([v in SUPPORT for v in range(VOCAB)])
    garbage = torch.where(valid, s.log(), float("nan"))
    close(total_variation(garbage, t.log(), valid), 0.5 * (s - t)[SUPPORT].abs().sum())
    disjoint = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    assert total_variation(*disjoint) == 1
