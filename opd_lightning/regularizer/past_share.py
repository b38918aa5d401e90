"""IW-OPD's weight by the share of the signal that has passed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want

_LEAST = 1e-8


@dataclass(frozen=True, kw_only=True)
class PastShare:
    """Scales the weight of the student's tokens by how much of the response's signal is still to come.

        w_t = 1 + gamma (1 - sum_{s<t} abs A_s / max(sum_s abs A_s, 1e-8))

    IW-OPD (arXiv 2606.22600), over the student's tokens of one response, masked ones too; A is the
    advantage as it reaches this part, detached: with estimator=token the log-ratio r. w falls from 1 + gamma
    at the first token towards 1. The metric ``past_share_weight`` is w.

    Raises:
        ConfigError: for a negative ``gamma`` at any time; on a call without advantages.
    """

    gamma: float | Schedule = 0.5

    needs: ClassVar[Needs] = Needs(advantage=True)
    want: ClassVar[Want] = Want()

    def __post_init__(self) -> None:
        require(
            within(self.gamma, 0.0, sys.float_info.max),
            "regularizer.past_share.gamma",
            "be a finite number of at least 0",
            self.gamma,
            "use 0.5, the paper's, or 0 for no weight",
        )

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with its weight scaled."""
        if loss.advantage is None:
            raise ConfigError("past_share needs an estimator's advantages; use estimator=token")
        sampled = experience.rollout.sampled
        size = masked_fill(loss.advantage.detach(), sampled).abs()
        past = size.cumsum(-1) - size
        left = 1.0 - past / size.sum(-1, keepdim=True).clamp(min=_LEAST)
        weight = torch.where(sampled, 1.0 + value_at(self.gamma, progress) * left, 1.0)
        metrics = {**loss.metrics, "past_share_weight": weight}
        return replace(loss, weight=loss.weight * weight, metrics=metrics)
