"""The mask that keeps tokens drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from opd_lightning.functional.selection import top_positions
from opd_lightning.mask._numbers import require_count, tokens_at
from opd_lightning.schedule import Schedule
from opd_lightning.seeds import mix
from opd_lightning.types import Experience, Needs
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class Random:
    """Keeps ``count`` tokens of each response that are still in the loss, drawn without replacement.

    The draw depends on the response's own seed alone, so it is the same on any number of processes, for
    micro-batches of any size and after a resumed run. A selector that ESR (arXiv 2605.27028) compares its
    prefix with.

    Args:
        count: tokens, a number or a schedule.

    Raises:
        ConfigError: if ``count`` is below 1 or no number.
    """

    count: float | Schedule

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        require_count(self.count, "mask.random.count")

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        rollout = experience.rollout
        score = torch.zeros(inside.shape)
        for row, (seed, length) in enumerate(
            zip(rollout.prompt.seeds, rollout.lengths.tolist(), strict=True)
        ):
            draw = torch.Generator().manual_seed(mix(seed, "mask.random"))
            score[row, :length] = torch.rand(length, generator=draw)
        count = tokens_at(self.count, experience.progress)
        return top_positions(score.to(inside.device), inside, count)
