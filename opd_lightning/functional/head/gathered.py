"""Logits at given ids, from k rows of the head at each position."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_lightning.functional.head.kernels import kernels
from opd_lightning.functional.head.spec import Head


def support_logits(
    hidden: Float[Tensor, "n hidden"], head: Head, ids: Int[Tensor, "n k"]
) -> Float[Tensor, "n k"]:
    """Return the logits (not log-probs) of ``ids``, from k rows of the head at each position.

    Gradient flows into the hidden states, the weight and the bias. Rows of the head are multiplied in
    float32, whatever their own precision, and the gradient of a row, to which thousands of positions
    may contribute, is summed in float32 and rounded once.

    Raises:
        IndexError: if the head does not have one of the ids.
    """
    head.check(ids)
    raw = _GatheredLogits.apply(hidden.to(head.weight.dtype), head.weight, ids)
    finish = head.finish
    return finish.capped(raw if finish.bias is None else raw + finish.bias[ids])


class _GatheredLogits(torch.autograd.Function):
    """Written out because autograd would keep every gathered row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        with torch.autocast(hidden.device.type, enabled=False):
            return kernels(weight).products(hidden, weight, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        into_hidden, into_weight, _ = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            chosen = kernels(weight)
            return (
                chosen.pull_hidden(grad, hidden, weight, ids) if into_hidden else None,
                chosen.pull_weight(grad, hidden, weight, ids) if into_weight else None,
                None,
            )
