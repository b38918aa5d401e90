"""The mask that keeps the middle."""

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
class Middle:
    """Keeps a window of ``count`` tokens in the middle of each response's tokens that are still in the loss.

    Of n tokens the window begins after (n - count) // 2 of them; a shorter response stays whole. A selector
    that ESR (arXiv 2605.27028) compares its prefix with.

    Args:
        count: tokens, a number or a schedule.

    Raises:
        ConfigError: if ``count`` is below 1 or no number.
    """

    count: float | Schedule

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        require_count(self.count, "mask.middle.count")

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        count = tokens_at(self.count, experience.progress)
        begin = (inside.sum(-1, keepdim=True) - count) // 2  # below 0 in a shorter response, which stays
        place = ranks(inside)
        return inside & (place >= begin) & (place - begin < count)
