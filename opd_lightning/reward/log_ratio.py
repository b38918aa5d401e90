"""The plain reward of on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_lightning.functional.ratio import log_ratio
from opd_lightning.types import Experience, Needs


@dataclass(frozen=True, kw_only=True)
class LogRatio:
    """r = log T(y) - log S(y), detached; its mean under the student is -KL(S||T)."""

    needs: ClassVar[Needs] = Needs()

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return r for each token, nats."""
        return log_ratio(student_logp, teacher_logp).detach()
