"""REOPOLD's clipped reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs


@dataclass(frozen=True, kw_only=True)
class Floor:
    """max(r, floor), detached: no token is punished by more than ``floor`` (REOPOLD, arXiv 2603.11137).

    The floor, nats, bounds a heavy tail of r and makes the expected gradient differ from reverse KL's
    wherever it binds. The paper's formula has two readings: :meth:`mixture` and :meth:`odds`.

    Raises:
        ConfigError: if ``floor`` is not a number of at most 0 at all times.
    """

    floor: float | Schedule

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        require(
            within(self.floor, -math.inf, 0.0),
            "reward.floor",
            "be at most 0",
            self.floor,
            "use -1.72, the paper's lambda = 0.3, or reward=log_ratio for none",
        )

    @classmethod
    def mixture(cls, weight: float) -> Floor:
        """Return the floor (log lambda) / (1 - lambda), -1.72 at lambda = 0.3; lambda in (0, 1).

        It is the infimum of (1 - lambda)^-1 log(lambda + (1 - lambda) T/S), the log-ratio to the mixture
        lambda S + (1 - lambda) T rescaled to slope 1 at T = S, which is never below the floored r.
        """
        return cls(floor=math.log(_between(weight, 1.0)) / (1.0 - weight))

    @classmethod
    def odds(cls, weight: float) -> Floor:
        """Return the floor log(lambda / (1 - lambda)), -0.85 at lambda = 0.3; lambda in (0, 1/2]."""
        return cls(floor=math.log(_between(weight, 0.5) / (1.0 - weight)))

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return the floored r for each token, nats."""
        floor = value_at(self.floor, experience.progress)
        return log_ratio(student_logp, teacher_logp).detach().clamp(min=floor)


def _between(weight: float, most: float) -> float:
    inside = isinstance(weight, (int, float)) and 0.0 < weight <= most and weight < 1.0
    range_ = "(0, 1)" if most == 1.0 else f"(0, {most:g}]"
    require(inside, "reward.weight", f"be in {range_}", weight, "use 0.3, the paper's lambda")
    return weight
