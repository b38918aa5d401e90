"""Identities of one position that tie the formulas together, by enumeration of the taken token."""

import math

import pytest
import torch

from opd_lightning.functional.divergence import (
    forward_kl,
    generalised_reverse_kl,
    renormalise,
    reverse_kl,
    with_tail,
)
from opd_lightning.functional.ratio import LOG_RATIO_LIMIT, importance_weight, in_band, log_ratio

VOCAB, SUPPORT = 7, [0, 3, 4]


@pytest.fixture
def models():
    """Student logits (with gradient), log-probs of student, teacher and of another sampler."""
    draw = torch.Generator().manual_seed(2)
    logits, teacher, behavior = torch.randn(3, VOCAB, generator=draw, dtype=torch.float64) * 1.5
    logits.requires_grad_()
    return logits, logits.log_softmax(-1), teacher.log_softmax(-1), behavior.log_softmax(-1)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


# numerics 11.8
def test_an_advantage_that_ignores_the_token_teaches_nothing(models):
    """As the divergence of the position is one, as an advantage; a gate that sees the token changes that."""
    logits, student, teacher, _ = models
    advantage = reverse_kl(student, teacher).detach()
    per_token = student.detach().exp() * advantage * student
    close(gradient(per_token.sum(), logits), torch.zeros_like(logits), atol=1e-15)
    gated = per_token * (student < teacher)
    assert gradient(gated.sum(), logits).abs().max() > 0.01


# numerics 11.9
def test_every_candidate_as_an_action_is_direct_reverse_kl(models):
    """-sum_v sg(S_v r_v) log S_v, over the vocabulary."""
    logits, student, teacher, _ = models
    loss = -(student.exp() * log_ratio(student, teacher)).detach() @ student
    close(gradient(loss, logits), gradient(reverse_kl(student, teacher), logits))


# numerics 11.9
def test_candidates_of_a_support_as_actions(models):
    """Weighted by S renormalised, log-ratios over the vocabulary: the support's part of grad RKL, over P_S."""
    logits, student, teacher, _ = models
    s, t = student[SUPPORT], teacher[SUPPORT]
    weight = renormalise(s).exp()
    got = gradient(-(weight * log_ratio(s, t)).detach() @ s, logits)
    part = gradient(generalised_reverse_kl(s, t), logits)
    close(got, part / s.exp().sum().detach())
    # And the parts of a partition add up to the whole.
    rest = [v for v in range(VOCAB) if v not in SUPPORT]
    other = gradient(generalised_reverse_kl(student[rest], teacher[rest]), logits)
    close(part + other, gradient(reverse_kl(student, teacher), logits))
    assert other.abs().max() > 0.01


# numerics 11.15
def test_taken_or_not_taken_is_not_reverse_kl(models):
    """The divergence over {y, all the rest} with y ~ S."""
    logits, student, teacher, _ = models
    pair = with_tail(student.unsqueeze(-1)), with_tail(teacher.unsqueeze(-1))
    s, t = student.detach().exp(), teacher.exp()
    got = gradient((s * reverse_kl(*pair)).sum(), logits)
    inner = s.square() * ((s / t).log() - ((1 - s) / (1 - t)).log())
    # sum_y inner_y grad log S_y, with d log S_y / dz = onehot(y) - S
    close(got, inner - s * inner.sum())
    assert (got - gradient(reverse_kl(student, teacher), logits)).abs().max() > 0.01


# numerics 11.16
def test_importance_weights_move_the_expectation(models):
    """Tokens from mu with weight S / mu give what tokens from S give: both sampled-token gradients."""
    logits, student, teacher, behavior = models
    weight = importance_weight(student, behavior)
    assert not weight.requires_grad
    mu, reward = behavior.exp(), log_ratio(student, teacher).detach()
    expected = gradient(reverse_kl(student, teacher), logits)
    close(gradient(-(mu * weight * reward * student).sum(), logits), expected)
    assert (gradient(-(mu * reward * student).sum(), logits) - expected).abs().max() > 0.01
    # Tokens of the teacher need no weight where its own expectation is wanted: -E_T[log S] is forward KL.
    close(gradient(-(teacher.exp() * student).sum(), logits), gradient(forward_kl(student, teacher), logits))


# numerics 11.16
def test_cap_and_band(models):
    _, student, _, behavior = models
    ratio = (student - behavior).detach().exp()
    capped = importance_weight(student, behavior, cap=1.0)
    over = ratio > 1.0
    assert 0 < over.sum() < VOCAB
    assert (capped[over] == 1.0).all()
    close(capped[~over], ratio[~over])
    assert in_band(ratio, 0.5, 2.0).tolist() == [0.5 <= r <= 2.0 for r in ratio.tolist()]
    assert in_band(torch.tensor([0.4, 0.5, 2.0, 2.1]), 0.5, 2.0).tolist() == [False, True, True, False]


def test_importance_weight_known_numbers_and_limits():
    # S = .5, mu = .2: 2.5
    got = importance_weight(torch.tensor(0.5).log(), torch.tensor(0.2).log())
    assert got.item() == pytest.approx(2.5)
    far = importance_weight(torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0]))
    assert far.tolist() == pytest.approx([math.exp(LOG_RATIO_LIMIT), math.exp(-LOG_RATIO_LIMIT)])
    assert importance_weight(*torch.zeros(2, 1, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match="cap must be positive, got 0"):
        importance_weight(torch.zeros(1), torch.zeros(1), cap=0.0)
    with pytest.raises(ValueError, match="a band must have 0 <= low <= high"):
        in_band(torch.zeros(1), 2.0, 1.0)
