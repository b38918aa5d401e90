"""Shares of the loss: numbers, what they sum to, and that no split of a step changes them."""

import pytest
import torch

from opd_lightning.reduction.sequence_mean import SequenceMean
from opd_lightning.reduction.token_mean import TokenMean

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
both = pytest.mark.parametrize("reduction", [TokenMean(), SequenceMean()], ids=["token", "sequence"])


def alone(number):
    return number


def test_known_numbers():
    # 3 + 1 + 0 + 2 = 6 tokens
    sixth = 1 / 6
    expected = [[sixth] * 3 + [0], [sixth, 0, 0, 0], [0] * 4, [0, sixth, 0, sixth]]
    torch.testing.assert_close(TokenMean()(MASK, alone), torch.tensor(expected))
    # 3 responses that have tokens: 1/3 each, over 3, 1 and 2 tokens
    expected = [[1 / 9] * 3 + [0], [1 / 3, 0, 0, 0], [0] * 4, [0, sixth, 0, sixth]]
    torch.testing.assert_close(SequenceMean()(MASK, alone), torch.tensor(expected))


@both
def test_shares_sum_to_one_and_only_inside(reduction):
    share = reduction(MASK, alone)
    assert share.dtype == torch.float32
    assert share.sum().item() == pytest.approx(1)
    assert (share[~MASK] == 0).all()
    assert (share[MASK] > 0).all()


@both
@pytest.mark.parametrize("cuts", [[1, 3], [2, 2], [3, 1], [0, 4]])
def test_ranks_do_not_matter(reduction, cuts):
    """numerics 11.23: with the counts summed over ranks, each computes the same shares."""
    parts = MASK.split(cuts)
    counts = []
    for part in parts:
        reduction(part, lambda n: counts.append(n) or n)
    whole = torch.stack(counts).sum()
    got = torch.cat([reduction(part, lambda n: whole) for part in parts])
    torch.testing.assert_close(got, reduction(MASK, alone), atol=1e-7, rtol=0)


# numerics 11.23
@both
def test_padding_does_not_matter(reduction):
    padded = torch.nn.functional.pad(MASK, (0, 3, 0, 2))
    assert reduction(padded, alone)[:4, :4].equal(reduction(MASK, alone))


@both
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_in_the_loss(reduction, shape):
    """numerics 11.24."""
    share = reduction(torch.zeros(shape, dtype=torch.bool), alone)
    assert share.shape == shape
    assert (share == 0).all()


@both
def test_a_rank_without_tokens_beside_one_that_has_some(reduction):
    share = reduction(torch.zeros(2, 3, dtype=torch.bool), lambda n: n + 5)
    assert (share == 0).all()
