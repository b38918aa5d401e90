"""A divergence of whole rows of logits with its gradient: in closed form where there is one, else by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.functional.head import triton_rows
from opd_lightning.functional.head.spec import Finish, Head, wide

_TINY = 1e-37
"""Keeps the logarithm of a mixture finite where neither side has any mass to weigh it with."""


class Sides(NamedTuple):
    """Raw products of the student's and the teacher's head, free to be overwritten, and what makes logits of them."""

    student: Float[Tensor, "n v"]
    student_finish: Finish
    teacher: Float[Tensor, "n v"]
    teacher_finish: Finish


@runtime_checkable
class Comparing(Protocol):
    """From both sides' raw products to values and gradients.

    ``dtype`` is what the raw products are kept in, ``spares`` the number of buffers of their size that it
    wants beside the two sides, and ``hidden_buffers`` of those that it makes itself.
    """

    def dtype(self, product: torch.dtype) -> torch.dtype:
        """Return what the raw products are kept in."""
        ...

    @property
    def spares(self) -> int:
        """Buffers wanted."""
        ...

    @property
    def hidden_buffers(self) -> int:
        """Buffers made."""
        ...

    def __call__(
        self, sides: Sides, spares: Sequence[Float[Tensor, "n v"]], gradient: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"] | None]:
        """Return each row's divergence, nats, and its gradient in the student's raw products."""
        ...


def comparing(
    divergence: Callable[[Tensor, Tensor], Tensor], student: Head, teacher: Head, *, one_dtype: bool
) -> Comparing:
    """Return the fastest way to ``divergence``: the closed form of a generalised JSD, or autograd.

    A divergence tells by ``as_jsd``, its beta and whether it is scaled, that it is one. ``one_dtype``: both
    heads' products have the same, as the kernels on a GPU want it.
    """
    jsd: tuple[float, bool] | None = getattr(divergence, "as_jsd", None)
    # An id that a bias of -inf rules out has log-probs whose difference only the plain form knows to ignore.
    ruled_out = any(h.bias is not None and not bool(h.bias.isfinite().all()) for h in (student, teacher))
    if jsd is None or ruled_out:
        return Differentiated(divergence=divergence)
    if one_dtype and triton_rows.available(student.weight):
        return KernelJSD(beta=jsd[0], scaled=jsd[1])
    return ClosedJSD(beta=jsd[0], scaled=jsd[1], capped=not student.finish.linear)


@dataclass(frozen=True, kw_only=True)
class Differentiated:
    """Any divergence of two rows of log-probs, differentiated by autograd within the chunk."""

    divergence: Callable[[Tensor, Tensor], Tensor]
    spares: ClassVar[int] = 0
    hidden_buffers: ClassVar[int] = 8

    def dtype(self, product: torch.dtype) -> torch.dtype:
        """Return at least float32."""
        return wide(product)

    def __call__(
        self, sides: Sides, spares: Sequence[Float[Tensor, "n v"]], gradient: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"] | None]:
        """Return values and gradients; see :class:`Comparing`."""
        raw = sides.student.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            student = sides.student_finish(raw).log_softmax(-1)
            value = self.divergence(student, sides.teacher_finish(sides.teacher).log_softmax(-1))
            grad = torch.autograd.grad(value.sum(), raw)[0] if gradient else None
        return value.detach(), grad


@dataclass(frozen=True, kw_only=True)
class ClosedJSD:
    """Generalised JSD (GKD, arXiv 2306.13649) of whole rows: beta 1 is reverse KL, beta 0 forward KL.

        D = beta KL(T||M) + (1 - beta) KL(S||M),  M = beta T + (1 - beta) S
        dD/dz_v = G_v - S_v sum_u G_u,            G_v = (1 - beta) S_v (log S_v - log M_v)

    and for reverse KL ``G_v = S_v (log S_v - log T_v)``, for forward KL ``dD/dz_v = S_v - T_v``.
    ``scaled`` divides by beta (1 - beta) where both are above 0. ``capped`` logits are kept for their slope.
    """

    beta: float
    scaled: bool
    capped: bool
    hidden_buffers: ClassVar[int] = 0

    def dtype(self, product: torch.dtype) -> torch.dtype:
        """Return at least float32."""
        return wide(product)

    @property
    def spares(self) -> int:
        """Buffers wanted."""
        return {1.0: 1, 0.0: 2}.get(self.beta, 3) + self.capped

    def __call__(
        self, sides: Sides, spares: Sequence[Float[Tensor, "n v"]], gradient: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"] | None]:
        """Return values and gradients; see :class:`Comparing`."""
        z, other = sides.student_finish.in_place(sides.student), sides.teacher_finish.in_place(sides.teacher)
        logits = spares[-1].copy_(z) if self.capped else z
        if self.beta == 1.0:
            value, grad = _reverse_kl(z, other, spares[0], gradient)
        elif self.beta == 0.0:
            value, grad = _forward_kl(z, other, spares, gradient)
        else:
            value, grad = _mixed(z, other, spares, self.beta, gradient)
            if self.scaled:
                factor = 1.0 / (self.beta * (1.0 - self.beta))
                value, grad = value * factor, None if grad is None else grad.mul_(factor)
        return value, None if grad is None else sides.student_finish.pull_back_(grad, logits)


@dataclass(frozen=True, kw_only=True)
class KernelJSD:
    """What :class:`ClosedJSD` computes, in Triton: every pass reads the products once, in their own dtype."""

    beta: float
    scaled: bool
    spares: ClassVar[int] = 0
    hidden_buffers: ClassVar[int] = 0

    def dtype(self, product: torch.dtype) -> torch.dtype:
        """Return the products' own."""
        return product

    def __call__(
        self, sides: Sides, spares: Sequence[Float[Tensor, "n v"]], gradient: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n v"] | None]:
        """Return values and gradients; see :class:`Comparing`."""
        value = triton_rows.compare(*sides, self.beta, self.scaled, gradient=gradient)
        return value, sides.student if gradient else None


def _centred(z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract its maximum from z, write exp of that into e; return sum e and its log ``[n 1]``."""
    torch.exp(z.sub_(z.amax(-1, keepdim=True)), out=e)
    total = e.sum(-1, keepdim=True)
    return total, total.log()


def _reverse_kl(z: Tensor, other: Tensor, e: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    other_log = _centred(other, e)[1]
    total, log_total = _centred(z, e)
    gap = log_total - other_log  # log S - log T = (z - other) - gap
    weighted = torch.mul(e, z.sub_(other), out=other)
    value = weighted.sum(-1, keepdim=True) / total - gap
    if not gradient:
        return value.squeeze(-1), None
    # S (log S - log T - D) = (e (z - other) - e (gap + D)) / sum e
    return value.squeeze(-1), weighted.addcmul_(e, gap + value, value=-1).div_(total)


def _forward_kl(
    z: Tensor, other: Tensor, spares: Sequence[Tensor], gradient: bool
) -> tuple[Tensor, Tensor | None]:
    own, target = spares[:2]
    total, log_total = _centred(z, own)
    other_total, other_log = _centred(other, target)
    target.div_(other_total)
    gap = log_total - other_log  # log T - log S = (other - z) + gap
    value = other.sub_(z).mul_(target).sum(-1) + gap.squeeze(-1)
    return value, own.div_(total).sub_(target) if gradient else None


def _mixed(
    z: Tensor, other: Tensor, spares: Sequence[Tensor], beta: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    own, target, mixture = spares[:3]
    total, log_total = _centred(z, own)
    other_total, other_log = _centred(other, target)
    own.div_(total)
    target.div_(other_total)
    torch.mul(own, 1.0 - beta, out=mixture).add_(target, alpha=beta).clamp_(min=_TINY).log_()
    value = other.sub_(other_log).sub_(mixture).mul_(target).sum(-1).mul_(beta)
    pull = z.sub_(log_total).sub_(mixture).mul_(own).mul_(1.0 - beta)
    pulls = pull.sum(-1, keepdim=True)
    return value + pulls.squeeze(-1), pull.addcmul_(own, pulls, value=-1) if gradient else None
