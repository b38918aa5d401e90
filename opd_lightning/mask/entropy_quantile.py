"""The mask that keeps the tokens at which the student is least certain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from opd_lightning.functional.selection import keep_top_share
from opd_lightning.mask._numbers import collected, require_share
from opd_lightning.schedule import Schedule, value_at
from opd_lightning.types import Experience, Needs
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class EntropyQuantile:
    """Keeps the top ``share`` of an optimizer step's tokens by the student's entropy.

    g = 1[H_S >= h], h the (1 - share) quantile of H_S over the tokens still in the loss, of the whole
    optimizer step on all processes, at collection, nats. Phase II of REOPOLD (arXiv 2603.11137), and the row
    "Entropy" of TrOPD's tables (arXiv 2606.01249), both with share 0.2.

    Args:
        share: of the tokens, a number or a schedule.

    Raises:
        ConfigError: if ``share`` leaves [0, 1].
    """

    share: float | Schedule

    needs: ClassVar[Needs] = Needs(collected_entropy=True)

    def __post_init__(self) -> None:
        require_share(self.share, "mask.entropy_quantile.share", "use 0.2, the papers' value")

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        entropy = collected(experience.collected_entropy, "collected_entropy")
        return keep_top_share(entropy, inside, value_at(self.share, experience.progress), world.gather)
