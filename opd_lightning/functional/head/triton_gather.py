"""Logits at given ids from k rows of the head at each position, in Triton: nothing is gathered into memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.functional.head.triton_rows import on_device

BLOCK_K = 16
"""Rows of the head that a program reads side by side; 256 columns of each, 32 numbers a thread."""

BLOCK = 256

PIECE = 128
"""Entries of the sorted list that one program adds up. The scratch memory is 2 n k / PIECE rows in float32."""

_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

COLUMNS = 1024
"""Columns of them that it holds: 8 a thread, one wide read of a bf16 hidden state."""


def gather_dot(
    hidden: Float[Tensor, "n hidden"], weight: Float[Tensor, "v hidden"], ids: Int[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Return ``hidden[t] . weight[ids[t, j]]``, multiplied and added in float32."""
    from opd_lightning.functional.head import gather_kernels

    (n, k), width = ids.shape, hidden.shape[1]
    out = torch.empty(n, k, dtype=torch.float32, device=hidden.device)
    if out.numel():
        with on_device(hidden):
            gather_kernels.dot[(n, -(-k // BLOCK_K))](
                hidden.contiguous(), weight.contiguous(), ids.contiguous(), out, width, k, BLOCK_K=BLOCK_K,
                BLOCK=BLOCK, **_OPTIONS,
            )  # fmt: skip
    return out


def gather_backward(
    grad: Float[Tensor, "n k"],
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "v hidden"],
    ids: Int[Tensor, "n k"],
    *,
    into_hidden: bool,
    into_weight: bool,
) -> tuple[Float[Tensor, "n hidden"] | None, Float[Tensor, "v hidden"] | None]:
    """Return the gradients of :func:`gather_dot`, where asked, in the dtypes of hidden states and weight.

    d hidden[t] = sum_j grad[t, j] weight[ids[t, j]],    d weight[v] = sum_{t, j: ids[t, j] = v} grad[t, j] hidden[t]

    The second sorts the entries by id and adds up runs of equal ids, in float32 registers, so that a row of
    the weight is rounded and written once. Atomics would need a float32 copy of the weight, and the
    thousands of terms of a frequent id would queue for one row and come in another order each time.
    """
    grad, ids = grad.float().contiguous(), ids.contiguous()
    return (
        _hidden_gradient(grad, hidden, weight.contiguous(), ids) if into_hidden else None,
        _weight_gradient(grad, hidden.contiguous(), weight, ids) if into_weight else None,
    )


def _hidden_gradient(grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    from opd_lightning.functional.head import gather_kernels

    (n, k), width = ids.shape, hidden.shape[1]
    out = torch.empty(n, width, dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        with on_device(hidden):
            gather_kernels.hidden_gradient[(n, -(-width // BLOCK))](
                grad, weight, ids, out, width, k, BLOCK_K=BLOCK_K, BLOCK=BLOCK, **_OPTIONS
            )
    return out


def _weight_gradient(grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    from opd_lightning.functional.head import gather_kernels

    out = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    count, width = ids.numel(), hidden.shape[1]
    if not count:
        return out
    # 32 bits halve the work of the sort; a stable one keeps the order of the sums.
    found, order = ids.flatten().int().sort(stable=True)
    positions = (order // ids.shape[1]).int()
    pieces = -(-count // PIECE)
    heads, tails = torch.empty(2, pieces, width, dtype=torch.float32, device=hidden.device)
    grid = (pieces, -(-width // COLUMNS))
    with on_device(hidden):
        gather_kernels.weight_pieces[grid](
            grad.flatten()[order], hidden, positions, found, out, heads, tails, count, width, PIECE=PIECE,
            BLOCK=COLUMNS, **_OPTIONS,
        )  # fmt: skip
        gather_kernels.weight_runs[grid](
            found, out, heads, tails, count, width, PIECE=PIECE, BLOCK=COLUMNS, **_OPTIONS
        )
    return out
