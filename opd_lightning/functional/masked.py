"""Sums and means over the places that count; what stands elsewhere never matters.

Padding may hold anything, infinities and NaNs included. It is replaced *before* any arithmetic, since
a NaN multiplied by 0 is a NaN, in the value and again in the gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor


def masked_fill(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``values`` where ``mask`` holds and 0 elsewhere, in at least float32."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(mask, values, 0.0)


def masked_sum(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, ...]:
    """Return the sum over the masked places, of everything or along ``dim``; 0 with a graph if none."""
    kept = masked_fill(values, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, ...]:
    """Return the mean over the masked places, of everything or along ``dim``; 0 with a graph if none."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def weighted_sum(values: Float[Tensor, "*shape"], weight: Shaped[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return sum(weight * values), where a place with weight 0 may hold anything."""
    return (weight * masked_fill(values, weight != 0)).sum()
