"""The score-function estimators token by token: gaps, masks, padding, metrics, refusals."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from tabular import make_rollout

from opd_lightning.errors import ConfigError
from opd_lightning.estimator.discounted import Discounted
from opd_lightning.estimator.sequence import Sequence
from opd_lightning.estimator.token import Token
from opd_lightning.reward.floor import Floor
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Cosine
from opd_lightning.types import Experience, Needs, Origin, Scores, Want

ALL = {
    "token": Token(reward=LogRatio()),
    "discounted": Discounted(reward=LogRatio(), gamma=0.5),
    "sequence": Sequence(reward=LogRatio()),
}
every = pytest.mark.parametrize("estimator", ALL.values(), ids=ALL.keys())

STUDENT = torch.tensor([[-1.0, -2.0, -1.0, -4.0], [-1.0, -1.0, 0.0, 0.0]])
TEACHER = torch.tensor([[-2.0, -1.0, -3.0, -3.0], [-0.5, -2.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
# r = teacher - student
R = [[-1.0, 1.0, -2.0, 1.0], [0.5, -1.0, 0.0, 0.0]]


def make(student=STUDENT, teacher=TEACHER, mask=MASK, share=None, **changed):
    rollout = make_rollout(torch.ones_like(mask, dtype=torch.long), mask, **changed)
    share = torch.ones(mask.shape) if share is None else share
    experience = Experience(rollout=rollout, share=share, teacher_taken_logp=teacher)
    return Scores(taken_logp=student), experience


def test_known_numbers():
    scores, experience = make()
    expected = {
        "token": R,
        # gamma .5 from the right: 1; -2 + .5 = -1.5; 1 - .75 = .25; -1 + .125 = -.875 and -1; .5 - .5 = 0
        "discounted": [[-0.875, 0.25, -1.5, 1.0], [0.0, -1.0, 0.0, 0.0]],
        # -1 + 1 - 2 + 1 = -1 and .5 - 1 = -.5
        "sequence": [[-1.0, -1.0, -1.0, -1.0], [-0.5, -0.5, 0.0, 0.0]],
    }
    for name, estimator in ALL.items():
        loss = estimator(scores, experience, 0.0)
        assert loss.metrics["advantage"].tolist() == expected[name]
        assert loss.metrics["log_ratio"].tolist() == R
        assert loss.value.equal(-torch.tensor(expected[name]) * STUDENT)
        assert loss.weight.equal(MASK.float())


@every
def test_the_gradient_is_minus_the_advantage(estimator):
    student = STUDENT.clone().requires_grad_()
    scores, experience = make(student)
    loss = estimator(scores, experience, 0.0)
    loss.value.sum().backward()
    assert student.grad.equal(-loss.metrics["advantage"])
    assert not any(metric.requires_grad for metric in loss.metrics.values())


@every
def test_tokens_of_others_and_beyond_the_horizon_cut_the_return(estimator):
    """An environment's token at position 2 splits the first row in two; the horizon ends the second."""
    origin = torch.zeros(2, 4, dtype=torch.long)
    origin[0, 2] = Origin.ENVIRONMENT
    horizon = MASK.clone()
    horizon[1, 1] = False
    scores, experience = make(origin=origin, horizon=horizon)
    loss = estimator(scores, experience, 0.0)
    expected = {
        "token": [[-1.0, 1.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0]],
        # 1 | 1; -1 + .5 = -.5
        "discounted": [[-0.5, 1.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0]],
        # -1 + 1 + 1 = 1: one response, whatever lies in it
        "sequence": [[1.0, 1.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0]],
    }
    name = next(n for n, e in ALL.items() if e is estimator)
    assert loss.metrics["advantage"].tolist() == expected[name]
    assert loss.weight.tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]
    assert (loss.value[loss.weight == 0] == 0).all()


@every
def test_a_loss_mask_does_not_cut_the_return(estimator):
    """Shares decide what teaches; what happened stays credited."""
    share = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    expected = estimator(*make(), 0.0)
    got = estimator(*make(share=share), 0.0)
    assert got.value.equal(expected.value)
    assert got.weight.equal(expected.weight)


@every
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_padding_does_not_matter(estimator, garbage):
    student = STUDENT.masked_fill(~MASK, garbage).requires_grad_()
    got = estimator(*make(student, TEACHER.masked_fill(~MASK, garbage)), 0.0)
    expected = estimator(*make(), 0.0)
    assert got.value.equal(expected.value)
    (got.value * got.weight).sum().backward()
    assert (student.grad[~MASK] == 0).all()
    assert student.grad.isfinite().all()
    for name, metric in got.metrics.items():
        assert metric.equal(expected.metrics[name])


@every
def test_an_empty_row_and_an_empty_batch(estimator):
    """numerics 11.24: all-masked rows and empty responses."""
    student = STUDENT.clone().requires_grad_()
    loss = estimator(*make(student, mask=torch.zeros_like(MASK)), 0.0)
    assert (loss.value == 0).all()
    loss.value.sum().backward()
    assert (student.grad == 0).all()
    empty = torch.zeros(2, 0, requires_grad=True)
    loss = estimator(*make(empty, empty.detach(), torch.zeros(2, 0, dtype=torch.bool)), 0.0)
    assert loss.value.shape == (2, 0)
    assert loss.value.requires_grad


@every
def test_declares_what_it_needs(estimator):
    assert estimator.needs == Needs(teacher_taken=True)
    assert estimator.want == Want(taken=True)


@every
def test_half_precision_scores(estimator):
    loss = estimator(*make(STUDENT.bfloat16(), TEACHER.bfloat16()), 0.0)
    assert loss.value.dtype == loss.weight.dtype == torch.float32
    assert loss.value.equal(estimator(*make(), 0.0).value)


def test_rewards():
    student = torch.tensor([[-0.5, -0.5, -0.5]], requires_grad=True)
    teacher = torch.tensor([[-0.1, -1.5, -20.0]])
    _, experience = make()
    plain = LogRatio()(student, teacher, experience)
    floored = Floor(floor=-1.72)(student, teacher, experience)
    torch.testing.assert_close(plain, torch.tensor([[0.4, -1.0, -19.5]]))
    torch.testing.assert_close(floored, torch.tensor([[0.4, -1.0, -1.72]]))
    assert not plain.requires_grad
    assert not floored.requires_grad


def test_refusals():
    with pytest.raises((ConfigError, TypeCheckError), match=r"gradient.*(exactly 0|direct)"):
        Token(reward=LogRatio(), gradient="direct")
    for gamma in (-0.1, 1.01, float("nan"), Cosine(start=0.5, end=1.5)):
        with pytest.raises(ConfigError, match=r"`estimator.gamma` must be in \[0, 1\].*use 0 for"):
            Discounted(reward=LogRatio(), gamma=gamma)
    for floor in (0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"`reward.floor` must be at most 0, got .*use -1.72"):
            Floor(floor=floor)
    scores, experience = make()
    with pytest.raises(ConfigError, match="both models' log-probs"):
        ALL["token"](scores, replace(experience, teacher_taken_logp=None), 0.0)
