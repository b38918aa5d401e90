"""TIP's mask: tokens at which the student is uncertain or wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from opd_lightning.functional import divergence
from opd_lightning.functional.selection import keep_top_share, min_max
from opd_lightning.mask._numbers import collected, require_share
from opd_lightning.schedule import Schedule, value_at
from opd_lightning.types import Experience, FullTerm, Needs
from opd_lightning.world import World

_REVERSE = FullTerm("teacher", divergence.reverse_kl)


@dataclass(frozen=True, kw_only=True)
class Tip:
    """Keeps the top ``share`` of an optimizer step's tokens by h + d - h d (TIP, arXiv 2604.14084).

    h is the student's entropy and d its exact KL(S||T), both at collection and brought to [0, 1] by the
    least and the largest of them over the step's tokens still in the loss, on all processes. The score is
    large if either is, as the probability that at least one of two independent events happens.

    Args:
        share: of the tokens, a number or a schedule.

    Raises:
        ConfigError: if ``share`` leaves [0, 1].
    """

    share: float | Schedule

    needs: ClassVar[Needs] = Needs(collected_entropy=True, collected_full=frozenset({_REVERSE}))

    def __post_init__(self) -> None:
        require_share(self.share, "mask.tip.share", "use 0.5, the paper's value")

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        entropy = collected(experience.collected_entropy, "collected_entropy")
        apart = collected(experience.collected_full.get(_REVERSE), "collected_full")
        h, d = (min_max(values, inside, world.gather) for values in (entropy, apart))
        share = value_at(self.share, experience.progress)
        return keep_top_share(h + d - h * d, inside, share, world.gather)
