"""Tiles of the ``[n vocab]`` logits: their sizes, and what is computed on one of them, in place.

All functions here are the reference; on a GPU Triton kernels take their place where they win
(:mod:`~opd_lightning.functional.head.kernels`). ``dtype`` is that in which the raw products are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.functional.head.spec import Finish

SCRATCH = 256 << 20
"""Bytes of logits that may be alive at once, unless told otherwise."""

_CACHED = 1 << 20
"""Elements of a tile that a CPU core holds in its cache: passes over it cost a fraction of main memory's."""

_ROWS = 512
"""Rows of a CPU's tile; more do not make the products faster."""

_GPU_ROWS = 16384
"""Rows of a GPU's tile, so that it stays wide enough for its products however many positions there are."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """A grid over ``[n vocab]``: ``columns`` wide slices of the head, ``rows`` positions at a time."""

    n: int
    vocab: int
    rows: int
    columns: int

    @property
    def width(self) -> int:
        """Number of slices."""
        return -(-self.vocab // self.columns)

    def slices(self) -> Iterator[slice]:
        """Yield the slices of the vocabulary."""
        return _slices(self.vocab, self.columns)

    def blocks(self) -> Iterator[slice]:
        """Yield the blocks of positions."""
        return _slices(self.n, self.rows)


def tiling(
    n: int, vocab: int, *, device: torch.device, scratch: int, buffers: int, dtype: torch.dtype
) -> Tiling:
    """Return tiles of which ``buffers`` fit into ``scratch`` bytes; never less than one logit.

    Raises:
        ValueError: if ``scratch`` is not positive.
    """
    elements = _elements(scratch, buffers, dtype)
    if device.type == "cpu":
        elements = min(elements, _CACHED)
        rows = max(1, min(n, _ROWS, elements))
        return Tiling(n=n, vocab=vocab, rows=rows, columns=max(1, min(vocab, elements // rows)))
    rows = max(1, min(n, _GPU_ROWS, elements))
    columns = max(1, min(vocab, elements // rows))
    # A slice that begins at a multiple of 128 keeps the products aligned and the kernels' reads wide.
    return Tiling(n=n, vocab=vocab, rows=rows, columns=columns // 128 * 128 or columns)


def whole_rows(
    n: int,
    vocab: int,
    *,
    device: torch.device,
    scratch: int,
    buffers: int,
    dtype: torch.dtype,
    least: int = 256,
) -> Tiling:
    """Return tiles that hold whole rows, at least one: for what must see a row's logits more than once.

    ``least`` is the number of rows below which the matrix products suffer, wanted as far as ``scratch`` goes.
    """
    rows = max(1, _elements(scratch, buffers, dtype) // vocab)
    if device.type == "cpu":
        rows = min(rows, max(least, _CACHED // vocab))
    return Tiling(n=n, vocab=vocab, rows=min(rows, max(n, 1)), columns=vocab)


class Buffers:
    """Scratch memory for the tiles of one pass, allocated once: fresh memory costs as much as the arithmetic."""

    def __init__(self, grid: Tiling, count: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty(count, grid.rows * grid.columns, dtype=dtype, device=device)

    def tensors(self, n: int, v: int) -> list[Float[Tensor, "n v"]]:
        """Return each buffer as a tile of this size."""
        return [flat[: n * v].view(n, v) for flat in self.flat]


def multiply(
    hidden: Float[Tensor, "n hidden"], weight: Float[Tensor, "v hidden"], out: Float[Tensor, "n v"]
) -> Float[Tensor, "n v"]:
    """Write ``hidden weight^T`` into ``out``, rounded to the factors' dtype where ``out`` is wider."""
    if hidden.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)
    return out.copy_(hidden @ weight.T)


def _elements(scratch: int, buffers: int, dtype: torch.dtype) -> int:
    if scratch < 1:
        raise ValueError(f"scratch must be at least 1 byte, got {scratch}")
    return max(1, scratch // (buffers * dtype.itemsize))


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def statistics(
    raw: Float[Tensor, "n v"], finish: Finish, spare: Float[Tensor, "n v"] | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Return logsumexp(z) and, given a spare buffer, the entropy of softmax(z), nats; both are overwritten.

    H = log s - sum_v e_v (z_v - m) / s with e = exp(z - m), s = sum_v e_v, m = max z.
    """
    z = finish.in_place(raw)
    top = z.amax(-1, keepdim=True)
    z.sub_(top)
    if spare is None:
        total = z.exp_().sum(-1)
        return total.log() + top.squeeze(-1), None
    e = torch.exp(z, out=spare)
    total = e.sum(-1)
    log_total = total.log()
    return log_total + top.squeeze(-1), log_total - e.mul_(z).sum(-1) / total


def joined(
    lse: Float[Tensor, "n tiles"], entropy: Float[Tensor, "n tiles"] | None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Return the statistics of whole rows from those of their tiles.

    With w_i the mass of tile i: lse = logsumexp_i lse_i,  H = sum_i w_i (H_i - log w_i).
    """
    whole = lse.logsumexp(-1)
    if entropy is None:
        return whole, None
    log_mass = lse - whole.unsqueeze(-1)
    return whole, (log_mass.exp() * (entropy - log_mass)).sum(-1)


def gradient(
    raw: Float[Tensor, "n v"],
    finish: Finish,
    lse: Float[Tensor, " n"],
    pull: Float[Tensor, " n"],
    entropy: Float[Tensor, " n"] | None,
    entropy_pull: Float[Tensor, " n"] | None,
    spare: Float[Tensor, "n v"] | None,
) -> Float[Tensor, "n v"]:
    """Return the gradient of ``pull * lse + entropy_pull * H`` in ``raw``; it and the spare are overwritten.

    d lse / dz_v = p_v,    d H / dz_v = -p_v (log p_v + H)
    """
    z = finish.in_place(raw)
    logits = z if finish.linear else z.clone()
    logp = z.sub_(lse.unsqueeze(-1))
    if entropy_pull is None or entropy is None or spare is None:
        return finish.pull_back_(logp.exp_().mul_(pull.unsqueeze(-1)), logits)
    p = torch.exp(logp, out=spare)
    weight = logp.add_(entropy.unsqueeze(-1)).mul_(-entropy_pull.unsqueeze(-1)).add_(pull.unsqueeze(-1))
    return finish.pull_back_(p.mul_(weight), logits)
