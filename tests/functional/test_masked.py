"""Masked sums and means."""

import pytest
import torch

from opd_lightning.functional.masked import masked_fill, masked_mean, masked_sum, weighted_sum

MASK = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
CLEAN = torch.tensor([[1.0, 0.0, 5.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])


def test_known_numbers():
    values = CLEAN.masked_fill(~MASK, 100.0)
    assert masked_sum(values, MASK) == 9  # 1 + 5 + 3
    assert masked_mean(values, MASK) == 3  # 9 / 3
    assert masked_sum(values, MASK, -1).tolist() == [6, 3, 0]
    assert masked_mean(values, MASK, -1).tolist() == [3, 3, 0]
    assert masked_sum(values, MASK, 0).tolist() == [1, 3, 5]
    # .5*1 + .25*5 + 2*3
    assert weighted_sum(values, MASK * torch.tensor([[0.5, 9.0, 0.25], [9.0, 2.0, 9.0], [9.0] * 3])) == 7.75


FUNCTIONS = {
    "fill": lambda v, m: masked_fill(v, m).sum(),
    "sum": masked_sum,
    "mean": masked_mean,
    "rows": lambda v, m: masked_mean(v, m, -1).sum(),
    "weighted": lambda v, m: weighted_sum(v, m.float() * 0.5),
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@functions
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
def test_masked_places_do_not_matter(function, garbage):
    values = CLEAN.masked_fill(~MASK, garbage).requires_grad_()
    got = function(values, MASK)
    assert got == function(CLEAN, MASK)
    got.backward()
    assert (values.grad[~MASK] == 0).all()
    assert (values.grad[MASK] > 0).all()


# numerics 11.24
@functions
def test_empty_is_zero_with_a_graph(function):
    """All-masked rows and batches: value 0, gradient 0, never NaN (numerics.md section 9)."""
    values = torch.full((2, 3), float("nan"), requires_grad=True)
    got = function(values, torch.zeros(2, 3, dtype=torch.bool))
    assert got == 0
    got.backward()
    assert (values.grad == 0).all()


@functions
def test_computes_in_float32(function):
    assert function(CLEAN.bfloat16(), MASK).dtype == torch.float32
    assert function(CLEAN.double(), MASK).dtype == torch.float64
