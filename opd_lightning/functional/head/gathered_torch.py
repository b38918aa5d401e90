"""Products of hidden states with k rows of the head at each position, with neither a gather nor a dense product.

The products are those of a sparse matrix ``G [n vocab]`` whose row t has its entries at ``ids[t]``:

    logits = (hidden W^T) sampled at G's entries,   d hidden = G W,   d W = G^T hidden

with the gradient of the logits as G's values. The first is torch's sampled matrix product, the other two
are embedding bags: nothing of size ``[n k hidden]`` exists, and the work is 3 * 2 n k hidden.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from opd_lightning.functional.head.spec import upcast, wide

_BLOCK = 1 << 22
"""Largest ``[block k hidden]`` that is gathered where there is no sparse product: 16 MB in float32."""

_SPARSE = (torch.float32, torch.float64)


def products(
    hidden: Float[Tensor, "n hidden"], weight: Float[Tensor, "vocab hidden"], ids: Int[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Return ``hidden[t] . weight[ids[t, j]]``, in at least float32."""
    n, k = ids.shape
    # torch has room for no more entries than a dense matrix, repeated ids or not.
    if n and 0 < k <= len(weight) and hidden.device.type == "cpu" and hidden.dtype in _SPARSE:
        # Copied, as a view would keep the matrix and its indices, through which torch.compile cannot see.
        asked = _sparse(torch.arange(0, n * k + 1, k), ids.flatten(), hidden.new_zeros(n * k), len(weight))
        return torch.sparse.sampled_addmm(asked, hidden, weight.T, beta=0.0).values().clone().view(n, k)
    out = torch.empty(ids.shape, dtype=wide(hidden.dtype), device=hidden.device)
    for part in _blocks(ids, hidden):
        torch.bmm(upcast(weight[ids[part]]), upcast(hidden[part]).unsqueeze(-1), out=out[part].unsqueeze(-1))
    return out


def _sparse(starts: Tensor, ids: Tensor, values: Tensor, columns: int) -> Tensor:
    with warnings.catch_warnings():
        # Said once a process: that sparse matrices are in beta. The products used here are compared in the tests.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        shape = (len(starts) - 1, columns)
        return torch.sparse_csr_tensor(starts, ids, values, shape, check_invariants=False)


def pull_hidden(
    grad: Float[Tensor, "n k"], weight: Float[Tensor, "vocab hidden"], ids: Int[Tensor, "n k"]
) -> Float[Tensor, "n hidden"]:
    """Return ``sum_j grad[t, j] weight[ids[t, j]]``, in at least float32."""
    if weight.dtype == grad.dtype and ids.numel():
        return F.embedding_bag(ids, weight, per_sample_weights=grad.contiguous(), mode="sum")
    out = grad.new_zeros(len(grad), weight.shape[1])
    for part in _blocks(ids, weight):
        torch.bmm(grad[part].unsqueeze(1), upcast(weight[ids[part]]), out=out[part].unsqueeze(1))
    return out


def pull_weight(
    grad: Float[Tensor, "n k"], hidden: Float[Tensor, "n hidden"], ids: Int[Tensor, "n k"], vocab: int
) -> Float[Tensor, "vocab hidden"]:
    """Return, for each row v of the head, the sum of ``grad[t, j] hidden[t]`` where ``ids[t, j]`` is v.

    The entries are sorted by id, and each id's positions are one bag (of none, for most of a large
    vocabulary): sums in at least float32, in an order that does not depend on the number of threads.
    """
    if not ids.numel():
        return grad.new_zeros(vocab, hidden.shape[1])
    flat, order = ids.flatten().sort(stable=True)
    counts = torch.bincount(flat, minlength=vocab)
    return F.embedding_bag(
        order // ids.shape[1],
        hidden.to(grad.dtype),
        offsets=counts.cumsum(0) - counts,
        per_sample_weights=grad.flatten()[order],
        mode="sum",
    )


def _blocks(ids: Tensor, like: Tensor) -> list[slice]:
    size = max(1, _BLOCK // max(1, ids.shape[1] * like.shape[1]))
    return [slice(i, i + size) for i in range(0, ids.shape[0], size)]
