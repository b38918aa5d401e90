"""Generalised reverse KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional import divergence


@dataclass(frozen=True, kw_only=True)
class GeneralisedReverseKL:
    """Reverse KL that stays a divergence on a truncated support (Revisiting OPD, arXiv 2603.25562).

    For ``estimator.form=plain``: never negative there, at 0 where S = T on the support alone, and with
    exactly the support's part of the full reverse KL's gradient. On normalised rows (the other forms, the
    full support) it is reverse KL.
    """

    holds_truncated: ClassVar[bool] = True

    def __call__(
        self,
        student_logp: Float[Tensor, "*batch k"],
        teacher_logp: Float[Tensor, "*batch k"],
        valid: Bool[Tensor, "*batch k"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Return sum_v [S(v) log(S(v) / T(v)) - S(v) + T(v)], nats."""
        return divergence.generalised_reverse_kl(student_logp, teacher_logp, valid)
