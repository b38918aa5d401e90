"""Random numbers that belong to a response."""

import pytest
import torch

from opd_lightning.draws import uniform


def test_draws_belong_to_a_response():
    """Neither padding nor neighbours change a draw, another name or seed does."""
    long = uniform((5, 6), "gate", (2, 40))
    for time in (1, 15, 16, 17, 39):
        assert torch.equal(uniform((5, 6), "gate", (2, time)), long[:, :time])
    assert torch.equal(uniform((6,), "gate", (1, 40)), long[1:])
    assert not (uniform((5,), "other", (1, 40)) == long[:1]).any()
    assert not (long[0] == long[1]).any()
    assert (long >= 0).all()
    assert (long < 1).all()
    with pytest.raises(ValueError, match="as many seeds"):
        uniform((1,), "gate", (2, 3))
