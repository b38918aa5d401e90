"""Reverse KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional import divergence


@dataclass(frozen=True, kw_only=True)
class ReverseKL:
    """KL(S||T): mode-seeking, what student-written responses minimise on average."""

    as_jsd: ClassVar[tuple[float, bool]] = (1.0, False)

    def __call__(
        self,
        student_logp: Float[Tensor, "*batch k"],
        teacher_logp: Float[Tensor, "*batch k"],
        valid: Bool[Tensor, "*batch k"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Return sum_v S(v) log(S(v) / T(v)), nats."""
        return divergence.reverse_kl(student_logp, teacher_logp, valid)
