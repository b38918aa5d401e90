"""Choosing tokens by a score: the best of each row, and the best of everything in a step.

A score outside the mask may hold anything. Nothing here has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

_BLOCK = 64
"""Neighbours whose maximum decides first whether any of them can be among the largest."""


def largest(values: Float[Tensor, "n v"], k: int) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Return the places and values of each row's ``k`` largest entries, largest first.

    The k largest entries lie in the k blocks of largest maximum, or equal ones do: of a long row, two small
    selections in place of one over all of it. Among equal values the order is the backend's.
    """
    n, v = values.shape
    blocks = v // _BLOCK
    if k * _BLOCK * 4 > v or not n:
        found = values.topk(k, dim=-1)
        return found.indices, found.values
    maxima = values[:, : blocks * _BLOCK].unflatten(-1, (blocks, _BLOCK)).amax(-1)
    chosen = maxima.topk(k, dim=-1, sorted=False).indices
    places = (chosen.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
    rest = torch.arange(blocks * _BLOCK, v, device=values.device).expand(n, -1)
    places = torch.cat([places, rest], -1)
    found = values.gather(-1, places).topk(k, dim=-1)
    return places.gather(-1, found.indices), found.values


def ranks(mask: Bool[Tensor, "*rows time"]) -> Int[Tensor, "*rows time"]:
    """Return each masked token's number within its row, from 0; the others' are meaningless."""
    return mask.cumsum(-1) - 1


def top_positions(
    score: Shaped[Tensor, "rows time"], mask: Bool[Tensor, "rows time"], k: int
) -> Bool[Tensor, "rows time"]:
    """Return the min(n, k) tokens of largest score among the n masked ones of each row.

    Of equal scores the earlier token wins. A score that is not a number ranks last.
    """
    lowest = torch.full_like(score, -math.inf)
    order = torch.where(score.isnan(), lowest, score).argsort(dim=-1, descending=True, stable=True)
    # What is masked comes first, in that order: a score of -inf is still before everything outside.
    order = order.gather(-1, mask.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    place = torch.empty_like(order).scatter_(-1, order, ranks(torch.ones_like(mask)))
    return mask & (place < k)


def top_threshold(values: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """Return the value at which the top ``share`` of ``values`` begins: the ceil(share * n)-th largest.

    It is the (1 - share) quantile, read without interpolation, so that one of the values itself is kept.
    inf for share = 0 and without values.

    Raises:
        ValueError: if ``share`` lies outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be in [0, 1], got {share}")
    count = math.ceil(share * len(values) - 1e-9)  # 0.2 * 15 is 3.0000000000000004 in binary
    if count == 0:
        return values.new_tensor(math.inf)
    return values.topk(count).values[-1]


def keep_top_share(
    values: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    share: float,
    gather: Callable[[Tensor], Tensor],
) -> Bool[Tensor, "*shape"]:
    """Return where a masked value is among the top ``share`` of the masked values of all processes.

    Equal values stay or leave together, so that more than ``share`` can stay. ``gather`` joins the 1-d
    tensors of all processes; every process must call.

    Raises:
        ValueError: if ``share`` lies outside [0, 1].
    """
    return mask & (values >= top_threshold(gather(values[mask]), share))


def min_max(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], gather: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*shape"]:
    """Return (v - min) / (max - min) over the masked values of all processes; 0 elsewhere, and where all are equal."""
    every = gather(values[mask])
    if not len(every):
        return torch.zeros_like(values)
    low, high = every.min(), every.max()
    scaled = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(mask, scaled, 0.0)
