"""Importance weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.ratio import importance_weight, in_band
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scales the weight of sampled tokens by min(exp(clamp(l - l_mu, +-20)), cap), held fixed.

    l_mu is the log-prob under the truncated sampler that drew the token, l that of the untruncated student:
    as it was when it scored them (``of=sampler``: what top-p, the engine and generation ahead did) or as it is
    now (``of=policy``: also the optimizer steps since). Corrects a token given its prefix, not which prefixes
    are met. ``cap`` bounds the variance, at 2 in SDPO (arXiv 2601.20802). Outside ``band`` = [low, high] the
    weight is 0, before the cap (MOPD, arXiv 2601.02780). Comes before the parts that add a term, which it then
    leaves alone.

    Raises:
        ConfigError: an unknown ``of``, a cap that is not positive, no band with 0 <= low <= high at all times.
    """

    cap: float | Schedule
    of: Literal["sampler", "policy"] = "sampler"
    band: Sequence[float | Schedule] | None = None

    weighs_sampled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = "regularizer.importance"
        known = self.of in ("sampler", "policy")
        require(known, f"{name}.of", "be sampler or policy", self.of, "use sampler")
        require(
            within(self.cap, sys.float_info.min, math.inf), f"{name}.cap", "be above 0", self.cap, "use 2"
        )
        if self.band is not None:
            holds = _listed(self.band) and len(self.band) == 2 and _ordered(*self.band)
            remedy = "use [0.5, 2], or null for no band"
            require(
                holds, f"{name}.band", "be [low, high] with 0 <= low <= high at all times", self.band, remedy
            )
            object.__setattr__(self, "band", tuple(self.band))

    @property
    def needs(self) -> Needs:
        """The student's log-prob at collection, where that is the weight's numerator."""
        return Needs(collected_logp=self.of == "sampler")

    @property
    def want(self) -> Want:
        """The student's log-prob of the taken token, where the current one is the numerator."""
        return Want(taken=self.of == "policy")

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with scaled weights; metrics: the weight, and where cap or band changed it."""
        rollout, student = experience.rollout, scores.taken_logp
        student = experience.collected_logp if self.of == "sampler" else student
        if student is None:
            raise ConfigError(f"importance weights of the {self.of} need the student's log-probs")
        sampled = rollout.sampled
        ratio = importance_weight(masked_fill(student, sampled), masked_fill(rollout.behavior_logp, sampled))
        weight = ratio.clamp(max=value_at(self.cap, progress))
        if self.band is not None:
            weight = weight * in_band(ratio, *(value_at(bound, progress) for bound in self.band))
        metrics = {"importance": weight, "importance_cut": (weight != ratio).to(weight.dtype)}
        metrics = {name: masked_fill(metric, sampled) for name, metric in metrics.items()}
        scaled = loss.weight * torch.where(sampled, weight, 1.0)
        return replace(loss, weight=scaled, metrics={**loss.metrics, **metrics})


def _ordered(low: Any, high: Any) -> bool:
    """Return whether low >= 0 and no value of it lies above one of high's: two schedules may not overlap."""
    if not within(low, 0.0, math.inf):
        return False
    return within(high, max(value_at(low, end) for end in (0.0, 1.0)), math.inf)


def _listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
