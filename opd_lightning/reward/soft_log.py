"""The log-ratio, compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_lightning.functional.ratio import log_ratio
from opd_lightning.types import Experience, Needs


@dataclass(frozen=True, kw_only=True)
class SoftLog:
    """sign(r) log(1 + |r|), detached: about r where r is small, and growing with its logarithm (arXiv 2607.13399).

    Order and sign of the rewards stay; the expected gradient is not reverse KL's.
    """

    needs: ClassVar[Needs] = Needs()

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return the compressed r for each token."""
        reward = log_ratio(student_logp, teacher_logp).detach()
        return reward.sign() * reward.abs().log1p()
