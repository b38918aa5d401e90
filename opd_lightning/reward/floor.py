"""REOPOLD's clipped reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.types import Experience, Needs


@dataclass(frozen=True, kw_only=True)
class Floor:
    """max(r, floor), detached: no token is punished by more than ``floor`` (REOPOLD, arXiv 2603.11137).

    The paper writes the floor as (log lambda) / (1 - lambda), nats. It bounds a heavy tail of r and
    makes the expected gradient differ from reverse KL's wherever it binds.

    Raises:
        ConfigError: if ``floor`` is not a number of at most 0.
    """

    floor: float

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        require(
            isinstance(self.floor, (int, float)) and self.floor <= 0.0,
            "reward.floor",
            "be at most 0",
            self.floor,
            "use -1.72, the paper's lambda = 0.3, or reward=log_ratio for none",
        )

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return the floored r for each token, nats."""
        return log_ratio(student_logp, teacher_logp).detach().clamp(min=self.floor)
