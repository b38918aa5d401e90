"""Gradients of the head's inputs, added up tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lightning.functional.head.spec import wide


class Gradients:
    """Sums of the tiles' gradients in hidden states, weight and bias, in at least float32.

    Only what ``needed`` says of the three is computed. The weight's slice is summed over all positions
    before it is rounded once to the weight's dtype.
    """

    def __init__(self, needed: tuple[bool, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        precision = wide(weight.dtype)
        self.hidden = torch.zeros_like(hidden, dtype=precision) if needed[0] else None
        self.weight = torch.zeros_like(weight) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=precision) if bias is not None and needed[2] else None
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        self.open: Tensor | None = None

    def add(
        self, t: slice, v: slice, grad: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor | None = None
    ) -> None:
        """Add the gradient ``[t v]`` of a tile's raw products ``hidden weight^T``.

        ``scale [t]`` multiplies each position's part of the weight's and the bias's gradient, not of the
        hidden states'.
        """
        if self.bias is not None:
            self.bias[v] += grad.sum(0) if scale is None else grad.T @ scale.to(grad.dtype)
        narrow = grad.to(hidden.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[t], narrow, weight)
        if self.weight is not None:
            if self.open is None:
                whole = self.weight[v]
                self.open = whole if whole.dtype == grad.dtype else torch.zeros_like(whole, dtype=grad.dtype)
            scaled = hidden if scale is None else (hidden * scale.unsqueeze(-1)).to(hidden.dtype)
            _add_product(self.open, narrow.T, scaled)

    def close(self, v: slice) -> None:
        """Round the weight's slice, whose positions are all added."""
        if self.weight is not None and self.open is not None and self.open.dtype != self.weight.dtype:
            self.weight[v] = self.open
        self.open = None

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients in their inputs' dtypes."""
        found = [
            None if x is None or dtype is None else x.to(dtype)
            for x, dtype in zip((self.hidden, self.weight, self.bias), self.dtypes, strict=True)
        ]
        return found[0], found[1], found[2]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)  # not rounded in between
    else:
        total += a @ b
