"""The mask that keeps the end."""

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
class Last:
    """Keeps the last ``count`` tokens of each response that are still in the loss.

    A selector that ESR (arXiv 2605.27028) compares its prefix with. The last token is the one that stops,
    unless ``stop_token`` stands before this mask in the list.

    Args:
        count: tokens, a number or a schedule.

    Raises:
        ConfigError: if ``count`` is below 1 or no number.
    """

    count: float | Schedule

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        require_count(self.count, "mask.last.count")

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        left = inside.sum(-1, keepdim=True) - ranks(inside)
        return inside & (left <= tokens_at(self.count, experience.progress))
