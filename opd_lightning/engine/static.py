"""The fast decoder on memory that stays in place, so that a GPU can replay its step from a recording.

A step of a small model is hundreds of kernels that take less time to run than to launch. Recorded, they are
launched as one; but a recording is of fixed addresses and shapes. So rows and slots come in few sizes, what
changes from step to step lies in tensors that the step itself moves on, and slots without a token yet are
hidden by the attention bias.

Everything lives as long as one call of the engine: the weights' copies (fused, cast, gathered) are made
afresh for each, and the memory goes back to training.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.engine import cache
from opd_lightning.engine.decoder import Decoder, State
from opd_lightning.engine.recording import CudaGraphs, Record, plainly
from opd_lightning.layers import compute_dtype

_KEPT = 32
"""Recorded shapes that are kept, the latest used; a graph takes some megabytes."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """A key-value cache of fixed extent; ``slot`` is the one that a step fills."""

    store: Float[Tensor, "2 layers rows heads slots dim"]
    slot: Int[Tensor, " 1"]

    def write(
        self, layer: int, key: Float[Tensor, "rows heads 1 dim"], value: Float[Tensor, "rows heads 1 dim"]
    ) -> tuple[Float[Tensor, "rows heads slots dim"], Float[Tensor, "rows heads slots dim"]]:
        """Fill the slot and return the layer's keys and values, those of empty slots too."""
        keys, values = self.store[0, layer], self.store[1, layer]
        keys.index_copy_(2, self.slot, key.to(keys.dtype))
        values.index_copy_(2, self.slot, value.to(values.dtype))
        return keys, values


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """All that a step reads and writes beside the weights.

    ``position`` is that of the newest token that was read, ``bias`` 0 at the tokens and -inf elsewhere.
    Rows that are nobody's run along; they look at their own slots alone and are never looked at.
    """

    ids: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]
    slots: Slots
    bias: Float[Tensor, "rows 1 1 slots"]
    cos: Float[Tensor, "positions dim"]
    sin: Float[Tensor, "positions dim"]
    logits: Float[Tensor, "rows vocab"]

    def cut(self, rows: int, slots: int) -> Buffers:
        """Return views of the first ``rows`` rows and ``slots`` slots."""
        return replace(
            self,
            ids=self.ids[:rows],
            position=self.position[:rows],
            slots=replace(self.slots, store=self.slots.store[:, :, :rows, :, :slots]),
            bias=self.bias[:rows, ..., :slots],
            logits=self.logits[:rows],
        )


def step(decoder: Decoder, b: Buffers) -> None:
    """Read one more token of every row, write the logits after it, and move on by one slot and position."""
    b.position.add_(1)
    b.bias.index_fill_(3, b.slots.slot, 0.0)
    b.logits.copy_(decoder.forward(b.ids, b.position, b.cos, b.sin, b.slots, b.bias))
    b.slots.slot.add_(1)


@dataclass(frozen=True, kw_only=True)
class StaticState:
    """Where a decode stands: so many rows are alive, and so many slots are full."""

    owner: StaticDecoder
    rows: int
    used: int

    def keep(self, order: Int[Tensor, " kept"]) -> StaticState:
        """Return the state of the rows ``order`` of :func:`~opd_lightning.engine.cache.survivors`."""
        self.owner.move(order, self.used)
        return replace(self, rows=len(order))


class StaticDecoder:
    """A decoder whose steps run in the same memory; as :class:`~opd_lightning.engine.decoder.Decoder` in use.

    Mutable, and in one decode at a time: logits are valid until the next step, a state until the next
    prefill. The cache holds all ``rows`` rows for as many slots as the longest text so far has filled.
    """

    def __init__(self, decoder: Decoder, *, rows: int, slots: int, record: Record | None = None) -> None:
        """Take at most ``rows`` rows of ``slots`` slots. ``record``: None for CUDA graphs where there is CUDA."""
        self.decoder, self.limit, self.sizes = decoder, slots, row_sizes(rows)
        embed = decoder.embed
        self.record = record or (CudaGraphs(embed.device) if embed.is_cuda else plainly)
        self.steps: OrderedDict[tuple[int, int], Callable[[], None]] = OrderedDict()
        cos, sin = decoder.rotations(embed, slots)
        like = embed.new_empty(0, dtype=compute_dtype(embed))
        extent = (2, len(decoder.layers), rows, decoder.kv_heads, 0, decoder.head_dim)
        long = partial(torch.zeros, dtype=torch.long, device=embed.device)
        self.buffers = Buffers(
            ids=long(rows),
            position=long(rows),
            slots=Slots(store=like.new_empty(extent), slot=long(1)),
            bias=like.new_empty(rows, 1, 1, 0),
            cos=cos,
            sin=sin,
            logits=embed.new_zeros(rows, len(decoder.head.weight), dtype=decoder.head.weight.dtype),
        )

    def prefill(
        self, ids: Int[Tensor, "batch prompt"], mask: Bool[Tensor, "batch prompt"], budget: int
    ) -> tuple[Float[Tensor, "batch vocab"], StaticState]:
        """Read left-padded prompts; the state before is lost. ``budget`` is part of ``slots`` already."""
        logits, state = self.decoder.prefill(ids, mask, 0)
        self._load(state)
        return logits, StaticState(owner=self, rows=len(ids), used=ids.shape[1])

    def step(
        self, ids: Int[Tensor, " batch"], state: StaticState
    ) -> tuple[Float[Tensor, "batch vocab"], StaticState]:
        """Read one more token of every row; return the logits after it, until the next step, and the new state."""
        used = state.used + 1
        self._make_room(used)
        self.buffers.ids[: state.rows] = ids
        size = self.sizes[bisect_left(self.sizes, state.rows)]
        self._shaped(size, self._slots(used))()
        return self.buffers.logits[: state.rows], replace(state, used=used)

    def move(self, order: Int[Tensor, " kept"], used: int) -> None:
        """Put the rows ``order`` in front, in that order; only the moved rows are copied."""
        moved = (order >= len(order)).nonzero()[:, 0]
        if len(moved):
            b, source = self.buffers, order[moved]
            b.slots.store[:, :, moved, :, :used] = b.slots.store[:, :, source, :, :used]
            b.bias[moved] = b.bias[source]
            b.position[moved] = b.position[source]

    def _shaped(self, rows: int, slots: int) -> Callable[[], None]:
        """Return the step of that shape, recorded once while it is among those kept."""
        if (rows, slots) not in self.steps:
            if len(self.steps) >= _KEPT:
                self.steps.popitem(last=False)
            self.steps[rows, slots] = self.record(partial(step, self.decoder, self.buffers.cut(rows, slots)))
        self.steps.move_to_end((rows, slots))
        return self.steps[rows, slots]

    def _load(self, state: State) -> None:
        rows, used = len(state.position), state.cache.used
        self._make_room(used)
        b = self.buffers
        # A hidden slot has a weight of zero, and zero times what overflowed in a chunk before is not zero.
        b.slots.store.zero_()
        b.slots.store[:, :, :rows, :, :used] = state.cache.store[..., :used, :]
        b.slots.slot.fill_(used)
        b.bias.fill_(-torch.inf)
        b.bias[:rows, ..., :used] = 0.0 if state.bias is None else state.bias
        b.position.zero_()
        b.position[:rows] = state.position

    def _slots(self, used: int) -> int:
        return min(-(-used // cache.BLOCK) * cache.BLOCK, self.limit)

    def _make_room(self, used: int) -> None:
        """Widen the cache by a block where ``used`` slots do not fit; what was recorded has other addresses."""
        held, bias = self.buffers.slots.store, self.buffers.bias
        if used <= held.shape[4]:
            return
        self.steps.clear()
        store = held.new_zeros(*held.shape[:4], self._slots(used), held.shape[5])
        store[:, :, :, :, : held.shape[4]] = held
        wide = bias.new_full((len(bias), 1, 1, store.shape[4]), -torch.inf)
        wide[..., : bias.shape[3]] = bias
        self.buffers = replace(self.buffers, slots=replace(self.buffers.slots, store=store), bias=wide)


def row_sizes(most: int) -> list[int]:
    """Return the numbers of rows that steps come in: ``most``, and below it the powers of 2 and 1.5 times them.

    >>> row_sizes(20)
    [1, 2, 3, 4, 6, 8, 12, 16, 20]
    """
    sizes = {most, 1}
    for power in range(1, most.bit_length()):
        sizes |= {2**power, 3 * 2 ** (power - 1)}
    return sorted(size for size in sizes if size <= most)
