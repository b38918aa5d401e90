"""Expected gradients by enumeration: the score-function estimators against the exact objective.

Each estimator's loss is computed by the component itself on every possible response, weighted with the
response's probability, and differentiated.
"""

from dataclasses import replace

import pytest
import torch

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.discounted import Discounted
from opd_lightning.estimator.sequence import Sequence
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.reduction.sequence_mean import SequenceMean
from opd_lightning.reward.floor import Floor
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Linear

GAMMAS = [0.0, 0.3, 0.9, 1.0]


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def loss_of(estimator, world, progress=0.0):
    return estimator(world.scores, world.experience, progress)


def test_the_world_adds_up(world):
    """The enumeration itself: probabilities sum to 1, and the objective is the sum of its positions."""
    close(world.probability.sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-12)
    s, t = world.student_logp.detach(), world.teacher_logp
    per_prefix = (s.exp() * (s - t)).sum(-1)
    total = sum(visits * per_prefix[world.index[prefix]] for prefix, visits in world.visits.items())
    close(world.sequence_reverse_kl().detach(), total, atol=1e-12)


# numerics 11.18
def test_sequence_is_unbiased(world):
    """E[g_seq] = grad J."""
    got = world.expected_gradient(loss_of(Sequence(reward=LogRatio()), world))
    close(got, world.gradient(world.sequence_reverse_kl()))


# numerics 11.18
def test_rewards_to_go_are_unbiased(world):
    """Gamma = 1 is the causal estimator, E[g_causal] = grad J."""
    got = world.expected_gradient(loss_of(Discounted(reward=LogRatio(), gamma=1.0), world))
    close(got, world.gradient(world.sequence_reverse_kl()))
    close(got, world.score_sum(lambda d, t: sum(d[t:])))


# numerics 11.18
def test_token_has_exactly_the_stated_bias(world):
    """E[g_tok] = grad J - E sum_t sum_{t' > t} d_t' s_t."""
    got = world.expected_gradient(loss_of(Token(reward=LogRatio()), world))
    bias = world.score_sum(lambda d, t: sum(d[t + 1 :]))
    close(got, world.gradient(world.sequence_reverse_kl()) - bias)
    assert bias.abs().max() > 1e-2  # else the test would say nothing


# numerics 11.18
@pytest.mark.parametrize("gamma", GAMMAS)
def test_discounted_has_exactly_the_stated_bias(world, gamma):
    """What gamma < 1 leaves out is E sum_t sum_{t' > t} (1 - gamma^(t' - t)) d_t' s_t."""
    got = world.expected_gradient(loss_of(Discounted(reward=LogRatio(), gamma=gamma), world))

    def left_out(d, t):
        return sum((1 - gamma ** (later - t)) * d[later] for later in range(t + 1, len(d)))

    close(got, world.gradient(world.sequence_reverse_kl()) - world.score_sum(left_out))


# numerics 11.18
def test_a_token_is_not_to_blame_for_the_past(world):
    """E[d_t' s_t] = 0 for t' < t, which is why returns need not look back."""
    close(world.score_sum(lambda d, t: sum(d[:t])), torch.zeros_like(world.theta), atol=1e-12)


# numerics 11.18
def test_gamma_0_is_token(world):
    token = loss_of(Token(reward=LogRatio()), world)
    discounted = loss_of(Discounted(reward=LogRatio(), gamma=0.0), world)
    assert discounted.value.equal(token.value)
    assert discounted.weight.equal(token.weight)


def test_gamma_may_be_a_schedule(world):
    estimator = Discounted(reward=LogRatio(), gamma=Linear(start=1.0, end=0.0))
    for progress, gamma in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0)):
        expected = loss_of(Discounted(reward=LogRatio(), gamma=gamma), world)
        assert loss_of(estimator, world, progress).value.equal(expected.value)


# numerics 11.1, 11.19
def test_log_ratio_as_advantage_is_reverse_kl(world):
    """K1 as a score function equals direct reverse KL at fixed prefixes."""
    got = world.expected_gradient(loss_of(Token(reward=LogRatio()), world))
    s, t = world.student_logp, world.teacher_logp
    visits = torch.tensor([world.visits[p] for p in world.prefixes], dtype=torch.float64)
    close(got, world.gradient((visits * (s.exp() * (s - t)).sum(-1)).sum()))
    scores, experience = world.on_everything(ReverseKL())
    close(got, world.expected_gradient(TopK(divergence=ReverseKL())(scores, experience, 0.0)))


# numerics 11.1
def test_log_ratio_differentiated_directly_teaches_nothing(world):
    """The expected gradient of d itself is 0, so it is refused."""
    loss = loss_of(Token(reward=LogRatio()), world)
    direct = replace(loss, value=(world.scores.taken_logp - world.experience.teacher_taken_logp))
    close(world.expected_gradient(direct), torch.zeros_like(world.theta), atol=1e-12)
    with pytest.raises(ConfigError, match=r"`estimator.gradient` must be .*exactly 0.* use .*topk"):
        Token(reward=LogRatio(), gradient="direct")


# numerics 11.8
def test_an_advantage_of_the_position_alone_teaches_nothing(world):
    """Any number that does not depend on the sampled token has expected gradient 0."""
    per_prefix = torch.randn(len(world.prefixes), dtype=torch.float64)

    def of_position(student_logp, teacher_logp, experience):
        return per_prefix[world.rows]

    got = world.expected_gradient(loss_of(Token(reward=of_position), world))
    close(got, torch.zeros_like(got), atol=1e-12)


@pytest.mark.parametrize("floor", [-1.72, -0.1, 0.0])
def test_floor_by_loops(world, floor):
    """The floored reward's expected gradient is -E sum_t max(r_t, floor) s_t; a floor that never binds is none."""
    got = world.expected_gradient(loss_of(Token(reward=Floor(floor=floor)), world))
    close(got, world.score_sum(lambda d, t: -max(-d[t], floor)))
    unbound = loss_of(Token(reward=Floor(floor=-1e9)), world)
    assert unbound.value.equal(loss_of(Token(reward=LogRatio()), world).value)


# numerics 11.20
@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_a_horizon_equals_a_shorter_rollout(world, horizon):
    """Full rollout with the first N tokens in the loss = rollout stopped at N.

    gamma = 0, mean over the supervised tokens of each response, shared out by SequenceMean row by row.
    """
    estimator, reduction = Token(reward=LogRatio()), SequenceMean()
    inside = (torch.arange(world.time) < horizon).expand_as(world.mask)

    def share(mask):
        return torch.cat([reduction(row.unsqueeze(0), lambda count: count) for row in mask])

    rollout = replace(world.rollout, horizon=inside)
    loss = estimator(world.scores, replace(world.experience, rollout=rollout), 0.0)
    got = world.expected_gradient(loss, share(world.mask & inside))
    if horizon >= world.time:
        close(got, world.expected_gradient(loss_of(estimator, world), share(world.mask)))
        return
    short = type(world)(world.vocab, horizon)
    kept = [world.index[p] for p in short.prefixes]
    short.theta = world.theta.detach()[kept].requires_grad_()
    short.teacher = world.teacher[kept]
    expected = torch.zeros_like(got)
    expected[kept] = short.expected_gradient(loss_of(estimator, short), share(short.mask))
    close(got, expected)


# numerics 11.21
def test_variance_bounds(world):
    """Var(g_tok) <= n^2 B_d^2 B_s^2 and Var(g_seq) <= n^4 B_d^2 B_s^2; sequence varies more."""
    s, t = world.student_logp.detach(), world.teacher_logp
    bound_d = (s - t).abs().max().item()
    scores = torch.eye(world.vocab, dtype=torch.float64) - s.exp().unsqueeze(-2)
    bound_s = scores.norm(dim=-1).max().item()
    p, n = world.probability.detach(), world.time

    def variance(estimator):
        loss = loss_of(estimator, world)
        value = (loss.value * loss.weight).sum(-1)
        each = torch.stack(
            [torch.autograd.grad(v, world.theta, retain_graph=True)[0].flatten() for v in value]
        )
        mean = (p.unsqueeze(-1) * each).sum(0)
        return (p * (each - mean).square().sum(-1)).sum().item()

    token, sequence = variance(Token(reward=LogRatio())), variance(Sequence(reward=LogRatio()))
    assert 0 < token <= n**2 * bound_d**2 * bound_s**2
    assert token < sequence <= n**4 * bound_d**2 * bound_s**2
