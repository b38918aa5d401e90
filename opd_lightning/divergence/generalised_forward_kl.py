"""Generalised forward KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional import divergence


@dataclass(frozen=True, kw_only=True)
class GeneralisedForwardKL:
    """Forward KL that stays a divergence on a truncated support.

    For ``estimator.form=plain``: never negative there, at 0 where S = T on the support alone, whereas the
    truncated forward KL is least where S is T divided by its mass. On normalised rows (the other forms,
    the full support) it is forward KL.
    """

    holds_truncated: ClassVar[bool] = True

    def __call__(
        self,
        student_logp: Float[Tensor, "*batch k"],
        teacher_logp: Float[Tensor, "*batch k"],
        valid: Bool[Tensor, "*batch k"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Return sum_v [T(v) log(T(v) / S(v)) - T(v) + S(v)], nats."""
        return divergence.generalised_forward_kl(student_logp, teacher_logp, valid)
