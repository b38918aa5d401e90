"""What a head is: a matrix, and what a model family does to the logits behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

RULED_OUT = -1e20
"""Stands for a bias of -inf: finite, so that 0 times it is 0, even in a tile that holds nothing else."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """From raw products to logits: z = cap(scale * (raw + bias)) / temperature.

    cap(x) = softcap * tanh(x / softcap).
    """

    bias: Float[Tensor, " v"] | None = None
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0

    def __call__(self, raw: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Return the logits, in at least float32; ``raw`` stays as it is."""
        z = upcast(raw)
        if self.bias is not None:
            z = z + upcast(self.bias)
        return self.capped(z)

    def capped(self, z: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Return scaled, capped and tempered logits of products that hold their bias."""
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z if self.temperature == 1.0 else z / self.temperature

    def in_place(self, raw: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Turn ``raw``, of at least float32, into the logits."""
        if self.bias is not None:
            raw.add_(self.bias)
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw if self.temperature == 1.0 else raw.div_(self.temperature)

    def pull_back_(self, grad: Float[Tensor, "n v"], logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Turn a gradient in the logits into one in the raw products: times dz/draw, in place."""
        if self.softcap is not None:
            grad.mul_(1.0 - (logits * (self.temperature / self.softcap)).square_())
        slope = self.scale / self.temperature
        return grad if slope == 1.0 else grad.mul_(slope)

    @property
    def linear(self) -> bool:
        """Whether the slope is one number, so that :meth:`pull_back_` does not read the logits."""
        return self.softcap is None


@dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden states into logits: cap(scale * (W h + b)) / temperature.

    cap(x) = softcap * tanh(x / softcap). A tied head passes the embedding's weight; a slice of the weight
    is a head over fewer ids, and so is, without a softcap, a bias of -inf at the others. ``temperature`` is
    the scoring temperature tau: S = softmax(z / tau).
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0

    @property
    def vocab(self) -> int:
        """Number of ids."""
        return self.weight.shape[0]

    @property
    def finish(self) -> Finish:
        """What follows the matrix product; a bias of -inf becomes :data:`RULED_OUT`."""
        bias = None if self.bias is None else upcast(self.bias).clamp(min=RULED_OUT)
        return Finish(bias=bias, softcap=self.softcap, scale=self.scale, temperature=self.temperature)

    def cut(self, ids: slice) -> Head:
        """Return the head of these ids alone."""
        bias = None if self.bias is None else self.bias[ids]
        return replace(self, weight=self.weight[ids], bias=bias)

    def check(self, ids: Int[Tensor, "n k"]) -> None:
        """Refuse ids that the head does not have: what they would read lies beyond its memory.

        On a GPU, which is not waited for, the refusal comes as torch's own do: as a failed assertion, later.

        Raises:
            IndexError: if one lies outside [0, vocab).
        """
        inside = ((ids >= 0) & (ids < self.vocab)).all()
        if ids.is_cuda:
            torch._assert_async(inside)
        elif not inside:
            raise IndexError(f"ids must be in [0, {self.vocab}), got {ids.min()} to {ids.max()}")

    def detach(self) -> Head:
        """Return the same head without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of everything behind the matrix products: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def upcast(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32."""
    return x.to(wide(x.dtype))


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products: autocast's where it is on, else the weight's.

    Autocast leaves float64 as it is.
    """
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)
