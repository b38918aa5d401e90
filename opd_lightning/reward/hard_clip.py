"""The log-ratio, clipped on both sides."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs


@dataclass(frozen=True, kw_only=True)
class HardClip:
    """clip(r, -limit, limit), detached (arXiv 2607.13399). ``reward=floor`` clips from below alone.

    Raises:
        ConfigError: if ``limit`` is not a finite number above 0 at all times.
    """

    limit: float | Schedule

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        holds = within(self.limit, sys.float_info.min, sys.float_info.max)
        remedy = "use 5, or reward=log_ratio for none"
        require(holds, "reward.limit", "be a finite number above 0", self.limit, remedy)

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return the clipped r for each token, nats."""
        limit = value_at(self.limit, experience.progress)
        return log_ratio(student_logp, teacher_logp).detach().clamp(-limit, limit)
