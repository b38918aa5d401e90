"""Responses whose every token is drawn from the student and the teacher together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from opd_lightning.errors import require
from opd_lightning.functional.mixing import bounded_geometric_mix, linear_mix
from opd_lightning.protocols import Combine, Writer, Writers
from opd_lightning.rollout._parts import (
    Drawing,
    as_rollout,
    check_count,
    check_share,
    check_tokens,
    groups,
    tokens,
)
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Origin, PromptBatch, Rollout


@dataclass(frozen=True, kw_only=True)
class MixedRollout(Drawing, ABC):
    """Draws each token from a sampler mu that is made of both models' next-token distributions.

    mu is made at temperature 1; temperature and truncation then apply to mu. ``behavior_logp`` is the
    log-prob under what was drawn from. The tokens' origin is the student: they stand for its own text, and
    what corrects the difference is the weight S / mu of an estimator or regularizer that reads
    ``behavior_logp``. Without one the loss is that of mu's text.

    Args:
        samples: responses per prompt.
        max_new_tokens: longest response; a number or a schedule of progress.
        loss_horizon: first response tokens that are in the loss, None for all.
        temperature, top_p, top_k, min_p: of mu.

    Raises:
        ConfigError: a number out of its range.
    """

    samples: int
    loss_horizon: float | Schedule | None

    writers: ClassVar[frozenset[Writer]] = frozenset({"mixed"})

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        super().__post_init__()
        check_tokens(self.loss_horizon, "loss_horizon", optional=True)

    @abstractmethod
    def combine(self, progress: float) -> Combine:
        """Return how both models' log-probs become those of mu."""

    def __call__(self, prompts: PromptBatch, writers: Writers, progress: float, top_ids: int) -> Rollout:
        """Return the rollout, with the student's own top ids where asked."""
        asked = prompts.repeat(self.samples)
        sampling = self.sampling(tokens(self.max_new_tokens, progress), top_ids)
        return as_rollout(
            asked,
            writers.mixed(asked, sampling, self.combine(progress)),
            origin=Origin.STUDENT,
            group=groups(prompts, self.samples),
            horizon=None if self.loss_horizon is None else tokens(self.loss_horizon, progress),
        )


@dataclass(frozen=True, kw_only=True)
class LinearMix(MixedRollout):
    """mu = alpha T + (1 - alpha) S, the teacher-mixed sampling of MiniLLM (arXiv 2306.08543).

    Args:
        alpha: the teacher's share, in [0, 1]; a number or a schedule.
    """

    alpha: float | Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.alpha, "alpha", "use 0 for the student alone")

    def combine(self, progress: float) -> Combine:
        """Return the linear mix at ``progress``."""
        return partial(linear_mix, alpha=value_at(self.alpha, progress))


@dataclass(frozen=True, kw_only=True)
class GeometricMix(MixedRollout):
    """mu proportional to S^(1-b) T^b, the largest b in [0, 1] with KL(mu||S) <= epsilon (TRB, arXiv 2605.31159).

    The exponent is found at each position, so that text stays within epsilon nats of the student's wherever
    the two models disagree, and is the teacher's own where they are as near as that.

    Args:
        epsilon: bound in nats, at least 0 (0 is the student alone); a number or a schedule.
    """

    epsilon: float | Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = within(self.epsilon, 0.0, 1e9)
        remedy = "use 0 for the student alone"
        require(
            holds, "rollout.epsilon", "be a finite number of at least 0, or a schedule", self.epsilon, remedy
        )

    def combine(self, progress: float) -> Combine:
        """Return the geometric mix at ``progress``."""
        return partial(bounded_geometric_mix, epsilon=value_at(self.epsilon, progress))
