"""The key-value cache of the decoder: slots that grow in blocks, rows that leave as they finish."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK = 256
"""Slots added at a time: memory follows the text that exists, and copies stay rare."""


@runtime_checkable
class Cache(Protocol):
    """Where a layer's new keys and values go, and all of them come from."""

    def write(
        self,
        layer: int,
        key: Float[Tensor, "batch heads new dim"],
        value: Float[Tensor, "batch heads new dim"],
    ) -> tuple[Float[Tensor, "batch heads slots dim"], Float[Tensor, "batch heads slots dim"]]:
        """Take in the new ones and return the layer's keys and values."""
        ...


class KeyValueCache:
    """Keys and values of all layers in one tensor ``[2 layers batch heads slots dim]``.

    Mutable, and owned by one decode: every row writes the same slot at the same time (prompts are
    left-padded), so that a step's keys go into place without an index.
    """

    def __init__(self, layers: int, batch: int, heads: int, dim: int, limit: int, like: Tensor) -> None:
        """Hold at most ``limit`` slots, in the dtype and on the device of ``like``."""
        self.used = 0
        self.limit = limit
        self.store: Float[Tensor, "2 layers batch heads slots dim"] = like.new_empty(
            2, layers, batch, heads, 0, dim
        )

    def open(self, slots: int) -> None:
        """Make the next ``slots`` positions writable, allocating a block where they do not fit."""
        self.used += slots
        if self.used <= self.store.shape[4]:
            return
        held = self.store
        capacity = min(-(-self.used // BLOCK) * BLOCK, self.limit)
        self.store = held.new_empty(*held.shape[:4], capacity, held.shape[5])
        self.store[:, :, :, :, : held.shape[4]] = held

    def write(
        self,
        layer: int,
        key: Float[Tensor, "batch heads new dim"],
        value: Float[Tensor, "batch heads new dim"],
    ) -> tuple[Float[Tensor, "batch heads slots dim"], Float[Tensor, "batch heads slots dim"]]:
        """Fill the slots opened last and return all keys and values of the layer so far, as views."""
        keys, values = self.store[0, layer], self.store[1, layer]
        start = self.used - key.shape[2]
        keys[:, :, start : self.used] = key
        values[:, :, start : self.used] = value
        return keys[:, :, : self.used], values[:, :, : self.used]

    def keep(self, order: Int[Tensor, " kept"]) -> None:
        """Keep the rows ``order`` of :func:`survivors`, in that order; only the moved rows are copied."""
        moved = (order >= len(order)).nonzero()[:, 0]
        if len(moved):
            self.store[:, :, moved, :, : self.used] = self.store[:, :, order[moved], :, : self.used]
        self.store = self.store[:, :, : len(order)]


def survivors(done: Bool[Tensor, " batch"], count: int) -> Int[Tensor, " kept"]:
    """Return the ``count`` rows that are not done, the last of them moved into the places of those that are.

    >>> survivors(torch.tensor([False, True, False, False]), 3)
    tensor([0, 3, 2])
    """
    order = torch.arange(len(done), device=done.device)
    order[:count][done[:count]] = order[count:][~done[count:]]
    return order[:count]
