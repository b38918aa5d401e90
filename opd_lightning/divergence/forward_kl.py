"""Forward KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional import divergence


@dataclass(frozen=True, kw_only=True)
class ForwardKL:
    """KL(T||S): mass-covering, the cross-entropy to the teacher up to a constant."""

    holds_truncated: ClassVar[bool] = True
    as_jsd: ClassVar[tuple[float, bool]] = (0.0, False)

    def __call__(
        self,
        student_logp: Float[Tensor, "*batch k"],
        teacher_logp: Float[Tensor, "*batch k"],
        valid: Bool[Tensor, "*batch k"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Return sum_v T(v) log(T(v) / S(v)), nats."""
        return divergence.forward_kl(student_logp, teacher_logp, valid)
