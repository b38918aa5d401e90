"""Returns and log-ratios."""

import pytest
import torch

from opd_lightning.functional.ratio import log_ratio
from opd_lightning.functional.returns import discounted_return, sequence_return

NAN = float("nan")


def by_loop(values, mask, gamma):
    """The recursion as the reference code writes it: backward, reset to 0 at masked places."""
    out = []
    for row, kept in zip(values.tolist(), mask.tolist(), strict=True):
        running, result = 0.0, []
        for value, inside in reversed(list(zip(row, kept, strict=True))):
            running = value + gamma * running if inside else 0.0
            result.append(running)
        out.append(result[::-1])
    return torch.tensor(out, dtype=values.dtype).reshape(values.shape)


# numerics 11.18
def test_known_numbers():
    values = torch.tensor([[1.0, 2.0, 3.0, NAN, 5.0, 6.0]])
    mask = torch.tensor([[True, True, True, False, True, True]])
    # 3; 2 + .5*3 = 3.5; 1 + .5*3.5 = 2.75.  After the gap: 6; 5 + .5*6 = 8.
    got = discounted_return(values, mask, 0.5)
    assert got.tolist() == [[2.75, 3.5, 3.0, 0.0, 8.0, 6.0]]
    # 1 + 2 + 3 + 5 + 6 = 17 at every masked place, across the gap as well.
    assert sequence_return(values, mask).tolist() == [[17.0, 17.0, 17.0, 0.0, 17.0, 17.0]]


# numerics 11.18
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("time", [0, 1, 2, 7, 16, 33])
def test_equals_the_loop(gamma, time):
    draw = torch.Generator().manual_seed(time)
    values = torch.randn(9, time, generator=draw, dtype=torch.float64)
    mask = torch.rand(9, time, generator=draw) < 0.8
    got = discounted_return(values, mask, gamma)
    torch.testing.assert_close(got, by_loop(values, mask, gamma), atol=1e-12, rtol=0)


# numerics 11.18
def test_gamma_0_is_the_value_and_gamma_1_the_rest():
    values, mask = torch.randn(3, 12, dtype=torch.float64), torch.ones(3, 12, dtype=torch.bool)
    assert discounted_return(values, mask, 0.0).equal(values)
    rest = values.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(discounted_return(values, mask, 1.0), rest)
    torch.testing.assert_close(sequence_return(values, mask), rest[:, :1].expand(3, 12))


@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e30])
def test_masked_places_do_not_matter(garbage):
    mask = torch.tensor([[True, True, False, True], [False, False, False, False]])
    clean = torch.tensor([[1.0, -2.0, 0.0, 4.0], [0.0] * 4])
    for returns in (lambda v, m: discounted_return(v, m, 0.7), sequence_return):
        values = clean.masked_fill(~mask, garbage).requires_grad_()
        got = returns(values, mask)
        assert got.equal(returns(clean, mask))
        assert (got[~mask] == 0).all()
        got.sum().backward()
        assert (values.grad[~mask] == 0).all()
        assert (values.grad[mask] != 0).all()


def test_half_precision_is_summed_in_float32():
    values = torch.ones(1, 1000, dtype=torch.bfloat16)
    mask = torch.ones(1, 1000, dtype=torch.bool)
    # In bfloat16 a sum of ones stops at 256.
    assert discounted_return(values, mask, 1.0)[0, 0] == 1000
    assert sequence_return(values, mask)[0, 0] == 1000


@pytest.mark.parametrize("gamma", [-0.1, 1.5])
def test_refuses_other_gammas(gamma):
    with pytest.raises(ValueError, match="gamma must be in"):
        discounted_return(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), gamma)


def test_log_ratio_is_teacher_minus_student():
    got = log_ratio(torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-3.0], dtype=torch.bfloat16))
    assert got.item() == -2.0
    assert got.dtype == torch.float32
