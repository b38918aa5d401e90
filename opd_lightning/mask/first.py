"""The mask that keeps the beginning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from opd_lightning.functional.selection import ranks
from opd_lightning.mask._numbers import require_count, tokens_at
from opd_lightning.schedule import Schedule
from opd_lightning.types import Experience, Needs
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class First:
    """Keeps the first ``count`` tokens of each response that are still in the loss.

    With a mean over each response's tokens and no credit from later tokens (gamma 0), a whole response under
    this mask has the loss and gradient of an early-stopping rollout of as many tokens (ESR, arXiv 2605.27028,
    section 3); only the cost differs. As every mask it looks at what the masks before it in the list left.

    Args:
        count: tokens, a number or a schedule; the paper's N is 100.

    Raises:
        ConfigError: if ``count`` is below 1 or no number.
    """

    count: float | Schedule

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        require_count(self.count, "mask.first.count")

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        return inside & (ranks(inside) < tokens_at(self.count, experience.progress))
