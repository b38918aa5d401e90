"""The teacher's gain over a reference, extrapolated."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs


@dataclass(frozen=True, kw_only=True)
class Extrapolated:
    """scale (l_T - l_R) - (l_S - l_R), detached, with log-probs of the taken token (ExOPD, arXiv 2602.12125).

    At ``scale`` = 1 it is r, whatever the reference R; above, the student is sent beyond the teacher on the way
    from R to it. In the mean over y ~ S it is -KL(S||Q) up to a constant, Q ~ T^scale R^(1 - scale).

    Raises:
        ConfigError: if ``scale`` is not a finite number of at least 0; on a call without a reference's log-probs.
    """

    scale: float | Schedule

    needs: ClassVar[Needs] = Needs(reference_taken=True)

    def __post_init__(self) -> None:
        holds = within(self.scale, 0.0, sys.float_info.max)
        remedy = "use 1.25, the paper's lambda"
        require(holds, "reward.scale", "be a finite number of at least 0", self.scale, remedy)

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return the extrapolated reward for each token, nats."""
        if experience.reference_taken_logp is None:
            raise ConfigError("`reward=extrapolated` needs the reference's log-prob of the taken token")
        reference = masked_fill(experience.reference_taken_logp, experience.rollout.sampled)
        beyond = value_at(self.scale, experience.progress) - 1.0
        reward = log_ratio(student_logp, teacher_logp)
        return (reward + beyond * log_ratio(reference, teacher_logp)).detach()
