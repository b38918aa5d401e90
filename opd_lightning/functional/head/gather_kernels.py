"""Triton kernels for the product of hidden states with gathered rows of a head; see :mod:`triton_gather`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(
    hidden, weight, ids, out, width, k, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write out[n, k] = hidden[n] . weight[ids[n, k]]; a program a position and block of slots."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    asked = slots < k
    rows = tl.load(ids + row * k + slots, mask=asked, other=0).to(tl.int64)
    partial = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        h = tl.load(hidden + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(
            weight + rows[:, None] * width + columns[None, :],
            mask=asked[:, None] & inside[None, :],
            other=0.0,
        )
        partial += w.to(tl.float32) * h[None, :]
    tl.store(out + row * k + slots, tl.sum(partial, 1), mask=asked)


@triton.jit
def hidden_gradient(
    grad, weight, ids, out, width, k, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write out[n] = sum_k grad[n, k] weight[ids[n, k]]; a program a position and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    partial = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for start in range(0, k, BLOCK_K):
        slots = start + tl.arange(0, BLOCK_K)
        asked = slots < k
        rows = tl.load(ids + row * k + slots, mask=asked, other=0).to(tl.int64)
        g = tl.load(grad + row * k + slots, mask=asked, other=0.0)
        w = tl.load(
            weight + rows[:, None] * width + columns[None, :],
            mask=asked[:, None] & inside[None, :],
            other=0.0,
        )
        partial += w.to(tl.float32) * g[:, None]
    tl.store(out + row * width + columns, tl.sum(partial, 0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def weight_pieces(
    grads, hidden, positions, ids, out, heads, tails, count, width, PIECE: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the runs of equal ids within a piece of the sorted list; a program a piece and block of columns.

    A run that lies in one piece is final and goes to ``out``. Of a longer one, the first piece leaves its part
    in ``tails``, each later one in ``heads``: float32, [pieces width] each, added up by :func:`weight_runs`.
    The next hidden state is on its way while this one is added.
    """
    piece = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = piece * PIECE
    last = tl.minimum(first + PIECE, count)
    current = tl.load(ids + first)
    inherited = tl.load(ids + first - 1, mask=first > 0, other=-1) == current
    x = tl.load(hidden + tl.load(positions + first).to(tl.int64) * width + columns, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(first, last):
        g = tl.load(grads + i)
        following = tl.load(ids + i + 1, mask=i + 1 < count, other=-1)
        position = tl.load(positions + i + 1, mask=i + 1 < last, other=0).to(tl.int64)
        ahead = tl.load(hidden + position * width + columns, mask=inside, other=0.0)
        total += g * x.to(tl.float32)
        ends = following != current
        if ends | (i + 1 == last):
            if inherited:
                tl.store(heads + piece.to(tl.int64) * width + columns, total, mask=inside)
            elif ends:
                tl.store(
                    out + current.to(tl.int64) * width + columns, total.to(out.dtype.element_ty), mask=inside
                )
            else:
                tl.store(tails + piece.to(tl.int64) * width + columns, total, mask=inside)
        total = tl.where(ends, 0.0, total)
        inherited = inherited & (following == current)
        current = following
        x = ahead


@triton.jit
def weight_runs(
    ids, out, heads, tails, count, width, PIECE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the parts of each run that begins in this piece and goes on in the next, in order."""
    piece = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = piece * PIECE
    after = first + PIECE
    current = tl.load(ids + after - 1, mask=after <= count, other=-1)
    goes_on = tl.load(ids + after, mask=after < count, other=-2) == current
    began_before = tl.load(ids + first - 1, mask=first > 0, other=-3) == current
    if goes_on & (began_before == 0):
        total = tl.load(tails + piece.to(tl.int64) * width + columns, mask=inside, other=0.0)
        while tl.load(ids + after, mask=after < count, other=-2) == current:
            part = (after // PIECE).to(tl.int64)
            total += tl.load(heads + part * width + columns, mask=inside, other=0.0)
            after += PIECE
        tl.store(out + current.to(tl.int64) * width + columns, total.to(out.dtype.element_ty), mask=inside)
