"""The difference of powers of the two probabilities."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs


@dataclass(frozen=True, kw_only=True)
class Power:
    """T(y)^alpha - S(y)^alpha, detached, in [-1, 1] (PowerOPD, arXiv 2606.17199).

    A / alpha -> r as alpha -> 0: a small alpha needs a learning rate that is larger by 1 / alpha. A large one
    leaves only tokens of which one model is nearly sure.

    Raises:
        ConfigError: if ``alpha`` is not a finite number above 0 at all times.
    """

    alpha: float | Schedule

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        holds = within(self.alpha, sys.float_info.min, sys.float_info.max)
        remedy = "use 1, the difference of the probabilities, or reward=log_ratio for its limit at 0"
        require(holds, "reward.alpha", "be a finite number above 0", self.alpha, remedy)

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return the difference for each token."""
        alpha = value_at(self.alpha, experience.progress)
        dtype = torch.promote_types(student_logp.dtype, torch.float32)
        student, teacher = student_logp.detach().to(dtype), teacher_logp.detach().to(dtype)
        # Without the 1 of e^0, which near alpha = 0 would leave rounding alone.
        return (alpha * teacher).expm1() - (alpha * student).expm1()
