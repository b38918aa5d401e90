"""A divergence over the whole vocabulary, both heads in chunks of whole rows.

A position's value needs the logits of all ids twice (for the normalisers, then for the sum), so a chunk
holds whole rows of both heads. Its gradient is known there and then up to one number a position, the
share that the position has in the loss. With ``share`` given, the gradients into hidden states and head
are taken at once, and the backward pass only scales them: three products of the student's head and one
of the teacher's in all. Where the loss turns out to use another share, they are computed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_lightning.functional.head import tiles
from opd_lightning.functional.head.comparing import Comparing, Sides, comparing
from opd_lightning.functional.head.gradients import Gradients
from opd_lightning.functional.head.spec import Head, product_dtype, wide


def full(
    student_hidden: Float[Tensor, "n hidden"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "n width"],
    teacher_head: Head,
    divergence: Callable[[Tensor, Tensor], Tensor],
    *,
    share: Float[Tensor, " n"] | None = None,
    scratch: int = tiles.SCRATCH,
) -> Float[Tensor, " n"]:
    """Return ``divergence(student_logp, teacher_logp)`` over the whole vocabulary at every position.

    Gradient flows into the student's hidden states and head only. ``share`` is what the loss will multiply
    each value with, up to one factor for all, where that is known: a hint that saves the backward pass
    its matrix products and changes no result.

    Raises:
        ValueError: if the two heads have different vocabularies, or ``scratch`` is not positive.
    """
    if student_head.vocab != teacher_head.vocab:
        raise ValueError(
            f"student and teacher heads must cover the same ids, got {student_head.vocab} and "
            f"{teacher_head.vocab}; cut both to the shared vocabulary"
        )
    dtypes = (product_dtype(student_head.weight), product_dtype(teacher_head.weight))
    kernel = comparing(divergence, student_head, teacher_head, one_dtype=dtypes[0] == dtypes[1])
    comparison = _Comparison(
        student=student_head.detach(),
        teacher=teacher_head.detach(),
        teacher_hidden=teacher_hidden.detach(),
        kernel=kernel,
        scratch=scratch,
        dtypes=dtypes,
    )
    hint = share if torch.is_grad_enabled() else None  # Inside a Function the mode is off in any case.
    value: Tensor = _Full.apply(student_hidden, student_head.weight, student_head.bias, hint, comparison)
    return value


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """What both passes share; ``dtypes`` are those of the student's and the teacher's products."""

    student: Head
    teacher: Head
    teacher_hidden: Tensor
    kernel: Comparing
    scratch: int
    dtypes: tuple[torch.dtype, torch.dtype]

    def __call__(
        self, hidden: Tensor, needed: tuple[bool, ...], share: Tensor | None
    ) -> tuple[Tensor, Gradients]:
        """Return the values and, as far as ``needed``, gradients of them.

        That in the hidden states is each position's own; those in weight and bias are of ``sum(share * value)``.
        """
        head, gradient = self.student, any(needed)
        finishes = head.finish, self.teacher.finish
        weight, other = head.weight.to(self.dtypes[0]), self.teacher.weight.to(self.dtypes[1])
        grid = self._grid(len(hidden))
        kept = self.kernel.dtype(self.dtypes[0])
        buffers = tiles.Buffers(grid, 2 + self.kernel.spares, dtype=kept, device=hidden.device)
        value = torch.empty(len(hidden), dtype=wide(head.weight.dtype), device=hidden.device)
        into = Gradients(needed, hidden, head.weight, head.bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for t in grid.blocks():
                narrow = hidden[t].to(weight.dtype)
                student, teacher, *spares = buffers.tensors(len(narrow), head.vocab)
                tiles.multiply(narrow, weight, student)
                tiles.multiply(self.teacher_hidden[t].to(other.dtype), other, teacher)
                sides = Sides(student, finishes[0], teacher, finishes[1])
                value[t], grad = self.kernel(sides, spares, gradient)
                if grad is not None:
                    into.add(t, slice(None), grad, narrow, weight, None if share is None else share[t])
        into.close(slice(None))
        return value, into

    def _grid(self, n: int) -> tiles.Tiling:
        weight = self.student.weight
        return tiles.whole_rows(
            n,
            len(weight),
            device=weight.device,
            scratch=self.scratch,
            buffers=2 + self.kernel.spares + self.kernel.hidden_buffers,
            dtype=self.kernel.dtype(self.dtypes[0]),
        )


class _Full(torch.autograd.Function):
    """The values of a comparison; with a share, their gradients too, taken at once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        share: Tensor | None,
        comparison: _Comparison,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:3] if share is not None else (False, False, False)
        share = None if share is None else _unit(share)[0]
        value, into = comparison(hidden, needed, share)
        ctx.save_for_backward(hidden, weight, bias, share)
        # No input and no output, so free to be kept here, and given away by the first backward pass.
        ctx.taken = None if share is None else into.results()
        ctx.comparison = comparison
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
        hidden, _, _, share = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        taken, ctx.taken = ctx.taken, None
        into_hidden, into_weight, into_bias = taken or (None, None, None)
        factor = None if taken is None else _factor(pull, share)
        if factor is None:
            # A hidden state's own gradient, where it is there, holds for any share.
            again = (needed[0] and into_hidden is None, *needed[1:])
            unit, factor = _unit(pull)
            own, into_weight, into_bias = ctx.comparison(hidden, again, unit)[1].results()
            into_hidden = own if into_hidden is None else into_hidden
        return (
            _scale(into_hidden, pull),
            _scale(into_weight, factor),
            _scale(into_bias, factor),
            None,
            None,
        )


def _unit(share: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``share`` over its largest magnitude, which no dtype of a head's products rounds to 0, and that."""
    largest = share.abs().amax() if len(share) else share.new_ones(())
    largest = torch.where(largest > 0, largest, 1.0)
    return share / largest, largest


def _scale(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """Multiply ``gradient`` along its first axis by ``factor``, which may be too small or large for its dtype."""
    if gradient is None:
        return None
    return torch.mul(gradient, factor.view(-1, *[1] * (gradient.dim() - 1)), out=gradient)


def _factor(pull: Tensor, share: Tensor) -> Tensor | None:
    """Return c with ``pull = c * share`` up to rounding, or None if there is none."""
    if not len(pull):
        return pull.new_ones(())
    square = share.square().sum()
    factor = torch.where(square > 0, (pull * share).sum() / square, 0.0)
    tolerance = 1e-5 if pull.dtype == torch.float32 else 1e-12
    close = (pull - factor * share).abs().amax() <= tolerance * (factor * share).abs().amax()
    return factor if close else None
