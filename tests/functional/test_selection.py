"""Choosing tokens by a score, against literal answers and plain Python."""

import math

import pytest
import torch

from opd_lightning.functional.selection import keep_top_share, min_max, ranks, top_positions, top_threshold

NAN, INF = float("nan"), math.inf


def same(tensor):
    return tensor


def on(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_ranks_count_masked_tokens():
    mask = on([1, 0, 1, 1])
    assert ranks(mask)[mask].tolist() == [0, 1, 2]


def test_top_positions_by_hand():
    score = torch.tensor([[1.0, 9.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0, 9.0]])
    mask = on([1, 0, 1, 1, 1], [1, 1, 1, 1, 0])
    # 9 is outside; of two threes, and of four fives, the earlier win
    assert top_positions(score, mask, 1).int().tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert top_positions(score, mask, 3).int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert torch.equal(top_positions(score, mask, 4), mask)
    assert torch.equal(top_positions(score, mask, 2**62), mask)
    assert not top_positions(score, mask, 0).any()


def test_what_is_outside_never_matters():
    mask = on([0, 1, 1, 0])
    for outside in (INF, -INF, NAN):
        score = torch.tensor([[outside, 1.0, 2.0, outside]])
        assert top_positions(score, mask, 1).int().tolist() == [[0, 0, 1, 0]]
        assert keep_top_share(score, mask, 0.5, same).int().tolist() == [[0, 0, 1, 0]]
        assert min_max(score, mask, same).tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_no_token_is_lost_to_a_score_that_is_not_finite():
    score, mask = torch.tensor([[5.0, -INF, NAN, 1.0]]), on([0, 1, 1, 1])
    assert top_positions(score, mask, 1).int().tolist() == [[0, 0, 0, 1]]
    assert torch.equal(top_positions(score, mask, 3), mask)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_positions_against_sorting(k):
    draw = torch.Generator().manual_seed(k)
    score = torch.randint(0, 4, (20, 9), generator=draw).float()  # many ties
    mask = torch.rand(20, 9, generator=draw) < 0.6
    keep = top_positions(score, mask, k)
    for row in range(20):
        there = [t for t in range(9) if mask[row, t]]
        best = sorted(there, key=lambda t: (-score[row, t].item(), t))[:k]
        assert keep[row].nonzero().squeeze(-1).tolist() == sorted(best)


def test_threshold():
    values = torch.tensor([4.0, 1.0, 3.0, 5.0, 2.0])
    shares = (0.0, 0.2, 0.21, 0.4, 1.0)
    assert [top_threshold(values, s).item() for s in shares] == [INF, 5.0, 4.0, 4.0, 1.0]
    assert top_threshold(torch.zeros(0), 0.5) == INF
    # 0.07 * 100 is 7.000000000000001 in binary
    assert top_threshold(torch.arange(100.0), 0.07) == 93.0
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="share must be in"):
            top_threshold(values, share)


def test_the_share_is_of_all_ranks():
    """Two ranks of unlike scores: 4 of the 10 tokens stay, wherever they are."""
    values = [
        torch.tensor([[9.0, 8.0, 0.0], [7.0, 1.0, 100.0]]),
        torch.tensor([[6.0, 5.0], [4.0, 3.0], [2.0, 50.0]]),
    ]
    masks = [on([1, 1, 1], [1, 1, 0]), on([1, 1], [1, 1], [1, 0])]
    every = torch.cat([v[m] for v, m in zip(values, masks, strict=True)])
    keep = [keep_top_share(v, m, 0.4, lambda own: every) for v, m in zip(values, masks, strict=True)]
    assert [k.int().tolist() for k in keep] == [[[1, 1, 0], [1, 0, 0]], [[1, 0], [0, 0], [0, 0]]]
    low, high = 0.0, 9.0
    scaled = min_max(values[1], masks[1], lambda own: every)
    assert scaled[0].tolist() == pytest.approx([(6 - low) / (high - low), (5 - low) / (high - low)])
    alone = keep_top_share(values[1], masks[1], 0.4, same)
    assert alone.int().tolist() == [[1, 1], [0, 0], [0, 0]]


def test_equal_values_stay_together():
    values = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    assert keep_top_share(values, on([1, 1, 1, 1]), 0.25, same).int().tolist() == [[0, 1, 1, 1]]


def test_nothing_to_choose_from():
    values, none = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert not keep_top_share(values, none, 1.0, same).any()
    assert not top_positions(values, none, 2).any()
    assert min_max(values, none, same).tolist() == values.tolist()
    equal = min_max(torch.full((1, 2), 3.0), on([1, 1]), same)
    assert equal.tolist() == [[0.0, 0.0]]
