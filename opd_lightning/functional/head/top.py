"""The likeliest ids with their log-probs, log-probs at given ids and the entropy, in one pass without gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.functional.head import tiles
from opd_lightning.functional.head.spec import Finish, Head, product_dtype, wide
from opd_lightning.functional.selection import largest

_DONE = Finish()


class Top(NamedTuple):
    """The most likely ids with their log-probs, log-probs at the asked ids, and the entropy, nats."""

    ids: Int[Tensor, "n top"]
    logp: Float[Tensor, "n top"]
    asked_logp: Float[Tensor, "n k"]
    entropy: Float[Tensor, " n"] | None


@torch.no_grad()
def top(
    hidden: Float[Tensor, "n hidden"],
    head: Head,
    k: int,
    ids: Int[Tensor, "n k"],
    *,
    entropy: bool,
    scratch: int = tiles.SCRATCH,
) -> Top:
    """Return the ``k`` most likely ids and what :func:`exact` returns, in one pass, without gradient.

    ``ids`` may have no columns. Among equal logits the order is the backend's.

    Raises:
        IndexError: if the head does not have one of the ids.
        ValueError: if ``k`` exceeds the vocabulary, or ``scratch`` is not positive.
    """
    head.check(ids)
    if not 0 <= k <= head.vocab:
        raise ValueError(f"k must be between 0 and the vocabulary of {head.vocab}, got {k}")
    dtype, device = product_dtype(head.weight), hidden.device
    count, kept = 2 if entropy else 1, wide(dtype)
    grid = tiles.whole_rows(
        len(hidden), head.vocab, device=device, scratch=scratch, buffers=count, dtype=kept
    )
    buffers = tiles.Buffers(grid, count, dtype=kept, device=device)
    weight, finish = head.weight.to(dtype), head.finish
    pieces: list[tuple[Tensor, ...]] = []
    with torch.autocast(device.type, enabled=False):
        # No rows still make one (empty) block: its results have the right shapes.
        for t in list(grid.blocks()) or [slice(0, 0)]:
            z, *spare = buffers.tensors(len(hidden[t]), head.vocab)
            finish.in_place(tiles.multiply(hidden[t].to(dtype), weight, z))
            best, values, asked = *largest(z, k), z.gather(-1, ids[t])
            lse, information = tiles.statistics(z, _DONE, spare[0] if spare else None)
            found = (best, values - lse.unsqueeze(-1), asked - lse.unsqueeze(-1))
            pieces.append(found if information is None else (*found, information))
    top_ids, logp, asked_logp, *rest = (torch.cat(column) for column in zip(*pieces, strict=True))
    return Top(top_ids, logp, asked_logp, rest[0] if entropy else None)
