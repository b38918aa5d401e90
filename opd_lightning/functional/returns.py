"""Returns of per-token rewards along a response."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional.masked import masked_fill, masked_sum


def discounted_return(
    values: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"], gamma: float
) -> Float[Tensor, "*batch time"]:
    """Return G_t = values_t + gamma G_{t+1}, with G = 0 wherever ``mask`` is False.

    A return therefore restarts after a gap: nothing is credited across it. gamma = 0 gives the values
    themselves, gamma = 1 the rewards to go (Revisiting OPD, arXiv 2603.25562).

    Raises:
        ValueError: if ``gamma`` lies outside [0, 1].
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    # G_t = value_t + carry_t G_{t+1} is an affine map, and maps compose: each pass doubles the reach
    # of every one of them, so a response of 16,384 tokens takes 14 passes instead of 16,384 steps.
    value = masked_fill(values, mask)
    carry = mask.to(value.dtype) * gamma
    reach, time = 1, value.shape[-1]
    while reach < time:
        ahead = torch.zeros_like(value)
        ahead[..., :-reach] = value[..., reach:]
        further = torch.zeros_like(carry)
        further[..., :-reach] = carry[..., reach:]
        value, carry, reach = value + carry * ahead, carry * further, 2 * reach
    return value


def sequence_return(
    values: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """Return the sum of the row's masked values at each masked position, 0 elsewhere."""
    total = masked_sum(values, mask, dim=-1)
    return masked_fill(total.unsqueeze(-1).expand(mask.shape), mask)
