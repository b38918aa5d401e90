"""The log-ratio to a mixture of both models."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs


@dataclass(frozen=True, kw_only=True)
class LogMixture:
    """log(alpha rho + 1 - alpha) with rho = T(y) / S(y), detached (TOP-D, arXiv 2607.04751).

    The log-ratio of alpha T + (1 - alpha) S to S: never below log(1 - alpha), and r itself at alpha = 1.

    Raises:
        ConfigError: if ``alpha`` leaves (0, 1] at any time.
    """

    alpha: float | Schedule

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        holds = within(self.alpha, sys.float_info.min, 1.0)
        remedy = "use 0.1, the paper's, or 1 for the plain log-ratio"
        require(holds, "reward.alpha", "be in (0, 1]", self.alpha, remedy)

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return the log-ratio for each token, nats."""
        alpha = value_at(self.alpha, experience.progress)
        reward = log_ratio(student_logp, teacher_logp).detach()
        if alpha == 1.0:
            return reward
        rest = torch.full_like(reward, math.log1p(-alpha))
        return torch.logaddexp(reward + math.log(alpha), rest)
