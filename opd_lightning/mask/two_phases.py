"""REOPOLD's two phases: first without hopeless tokens, then uncertain tokens alone."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.mask._numbers import require_floor, require_share
from opd_lightning.mask.entropy_quantile import EntropyQuantile
from opd_lightning.mask.reward_floor import RewardFloor
from opd_lightning.schedule import Schedule
from opd_lightning.types import Experience, Needs
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class TwoPhases:
    """The gate g of REOPOLD (arXiv 2603.11137).

    Before progress ``switch`` (exploration) g = 1[r >= floor], as ``reward_floor``; from there on
    (refinement) g = 1[H_S >= h], as ``entropy_quantile``. The loss is divided by the number of tokens that
    a phase keeps. The paper's clipped reward, in force in both phases, is ``reward=floor``.

    Args:
        floor: of r, nats, at most 0; a number or a schedule.
        share: of the step's tokens that the second phase keeps; a number or a schedule.
        switch: share of the run at which the second phase begins; sources differ, from 1/3 to 1/2.

    Raises:
        ConfigError: a number out of its range.
    """

    floor: float | Schedule
    share: float | Schedule
    switch: float

    def __post_init__(self) -> None:
        require_floor(self.floor, "mask.two_phases.floor")
        require_share(self.share, "mask.two_phases.share", "use 0.2, the paper's value")
        number = isinstance(self.switch, int | float) and 0.0 <= self.switch <= 1.0
        require(number, "mask.two_phases.switch", "be in [0, 1]", self.switch, "use 0.5, half of the run")

    @property
    def needs(self) -> Needs:
        """What both phases need."""
        return RewardFloor.needs | EntropyQuantile.needs

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        first = experience.progress < self.switch
        phase = RewardFloor(floor=self.floor) if first else EntropyQuantile(share=self.share)
        return phase(experience, inside, world)
