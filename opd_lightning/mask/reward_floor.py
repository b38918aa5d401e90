"""The mask that drops tokens which the teacher finds all but impossible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from opd_lightning.functional.ratio import log_ratio
from opd_lightning.mask._numbers import collected, require_floor
from opd_lightning.schedule import Schedule, value_at
from opd_lightning.types import Experience, Needs
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class RewardFloor:
    """Keeps a token if r = log T(y) - log S(y), of the student at collection, is at least ``floor``, nats.

    Phase I of REOPOLD (arXiv 2603.11137): tokens that its clipped reward would clip are dropped. Their
    expected gradient is no longer reverse KL's (``reward=floor`` keeps them, at the floor).

    Args:
        floor: at most 0, a number or a schedule; the paper writes (log lambda) / (1 - lambda).

    Raises:
        ConfigError: if ``floor`` goes above 0 or is no number.
    """

    floor: float | Schedule

    needs: ClassVar[Needs] = Needs(collected_logp=True, teacher_taken=True)

    def __post_init__(self) -> None:
        require_floor(self.floor, "mask.reward_floor.floor")

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        student = collected(experience.collected_logp, "collected_logp")
        teacher = collected(experience.teacher_taken_logp, "teacher_taken_logp")
        return inside & (log_ratio(student, teacher) >= value_at(self.floor, experience.progress))
