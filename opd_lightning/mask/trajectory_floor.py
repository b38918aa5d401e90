"""FiRe-OPD's mask: whole responses that the teacher finds unlikely teach nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from opd_lightning.functional.masked import masked_mean
from opd_lightning.functional.selection import keep_top_share
from opd_lightning.mask._numbers import collected, require_share
from opd_lightning.schedule import Schedule, value_at
from opd_lightning.types import Experience, Needs
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class TrajectoryFloor:
    """Drops the ``share`` of an optimizer step's responses with the lowest mean log T(y) (arXiv 2606.02684).

    The mean runs over a response's tokens still in the loss; the quantile over the responses of the step on
    all processes that have such tokens. Of n responses floor(share * n) leave, fewer if some are equal.

    Args:
        share: of the responses, a number or a schedule.

    Raises:
        ConfigError: if ``share`` leaves [0, 1].
    """

    share: float | Schedule

    needs: ClassVar[Needs] = Needs(teacher_taken=True)

    def __post_init__(self) -> None:
        require_share(self.share, "mask.trajectory_floor.share", "use 0.2, the paper's value")

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        teacher = collected(experience.teacher_taken_logp, "teacher_taken_logp")
        mean = masked_mean(teacher, inside, -1)
        kept = 1.0 - value_at(self.share, experience.progress)
        return inside & keep_top_share(mean, inside.any(-1), kept, world.gather).unsqueeze(-1)
