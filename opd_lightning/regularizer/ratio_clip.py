"""The clip of PPO."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.surrogate import clipped_surrogate
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class RatioClip:
    """Puts -min(u A, clip(u, 1 - clip_low, 1 + clip_high) A) in the place of -A log S(y) on sampled tokens.

    PPO (arXiv 1707.06347) with u = S(y) / S_collected(y) and the estimator's advantage A; for several
    optimizer steps on one collection. S_collected is the student that scored it, whoever wrote it: beside
    ``engine.ahead=1``, ``importance`` holds the rest of S(y) over the sampler. With ``dual`` = c also at most
    -c A where A < 0 (arXiv 1912.09729).
    Weights and terms that other regularizers brought stay what they are, in whatever order.

    Raises:
        ConfigError: ``clip_low`` outside [0, 1], ``clip_high`` below 0, ``dual`` not above 1 + clip_high at all times.
    """

    clip_low: float | Schedule = 0.2
    clip_high: float | Schedule = 0.2
    dual: float | Schedule | None = None

    needs: ClassVar[Needs] = Needs(advantage=True, collected_logp=True)
    want: ClassVar[Want] = Want(taken=True)

    def __post_init__(self) -> None:
        name = "regularizer.ratio_clip"
        low, high = within(self.clip_low, 0.0, 1.0), within(self.clip_high, 0.0, sys.float_info.max)
        require(low, f"{name}.clip_low", "be in [0, 1]", self.clip_low, "use 0.2")
        require(high, f"{name}.clip_high", "be a finite number of at least 0", self.clip_high, "use 0.2")
        most = 1.0 + max(value_at(self.clip_high, end) for end in (0.0, 1.0))
        dual = self.dual is None or within(self.dual, math.nextafter(most, math.inf), math.inf)
        require(dual, f"{name}.dual", f"be null or above {most:g}", self.dual, "use 3")

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the changed loss; metrics: the ratio, and where a bound takes the gradient away."""
        student, collected = scores.taken_logp, experience.collected_logp
        if loss.advantage is None or student is None or collected is None:
            raise ConfigError("ratio_clip needs an advantage and the student's log-probs, now and collected")
        sampled = experience.rollout.sampled
        student, advantage = masked_fill(student, sampled), masked_fill(loss.advantage, sampled)
        surrogate, ratio, binds = clipped_surrogate(
            student,
            masked_fill(collected, sampled),
            advantage,
            low=value_at(self.clip_low, progress),
            high=value_at(self.clip_high, progress),
            dual=None if self.dual is None else value_at(self.dual, progress),
        )
        # A difference, as the value may hold more than -A log S(y) by now.
        value = loss.value + masked_fill(surrogate + advantage * student, sampled)
        metrics = {"ratio": masked_fill(ratio, sampled), "clip_fraction": (binds & sampled).to(value.dtype)}
        return replace(loss, value=value, metrics={**loss.metrics, **metrics})
