"""PW-OPSD's weight by position."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from opd_lightning.errors import require
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class PositionWeight:
    """Scales the weight of the student's tokens by w = least + (1 - least) sigmoid((t/n - center) / width).

    PW-OPSD (frontier.md, section 2; no paper id is known): early tokens count less. t = 1..n is the place in
    the response and n its length in tokens, whoever wrote them. ``least`` = 1 changes nothing. Stand it before
    or after the parts whose terms it shall leave alone or scale. The metric ``position_weight`` is w.

    Raises:
        ConfigError: unless ``least`` and ``center`` are in [0, 1] and ``width`` is positive, at any time.
    """

    least: float | Schedule = 0.25
    center: float | Schedule = 0.30
    width: float | Schedule = 0.10

    needs: ClassVar[Needs] = Needs()
    want: ClassVar[Want] = Want()

    def __post_init__(self) -> None:
        for name, low, high, condition, remedy in (
            ("least", 0.0, 1.0, "be in [0, 1]", "use 0.25"),
            ("center", 0.0, 1.0, "be in [0, 1], a share of the response", "use 0.30"),
            ("width", 1e-6, sys.float_info.max, "be a positive share of the response", "use 0.10"),
        ):
            value = getattr(self, name)
            require(within(value, low, high), f"regularizer.position_weight.{name}", condition, value, remedy)

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with its weight scaled."""
        rollout = experience.rollout
        least, center = value_at(self.least, progress), value_at(self.center, progress)
        width = value_at(self.width, progress)
        place = rollout.mask.to(loss.weight.dtype).cumsum(-1)
        share = place / rollout.lengths.clamp(min=1).unsqueeze(-1)
        weight = least + (1.0 - least) * torch.sigmoid((share - center) / width)
        weight = torch.where(rollout.sampled, weight, 1.0)
        metrics = {**loss.metrics, "position_weight": weight}
        return replace(loss, weight=loss.weight * weight, metrics=metrics)
