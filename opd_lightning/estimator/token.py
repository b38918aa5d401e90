"""The token-level score-function estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.estimator._score import ScoreFunction
from opd_lightning.functional.masked import masked_fill


@dataclass(frozen=True, kw_only=True)
class Token(ScoreFunction):
    """Each token answers for its own reward: A_t = r_t, value = -sg(r_t) log S(y_t).

    The expected gradient at a prefix is exactly that of KL(S||T) there. Over a response it leaves out
    how a token changes the prefixes after it, a bias bought for a variance of O(n^2) in place of
    O(n^4) (Revisiting OPD, arXiv 2603.25562). ``baseline``, ``normalise`` and ``origins``: see
    :class:`~opd_lightning.estimator._score.ScoreFunction`.

    ``gradient`` has one legal value. Differentiating -r itself ("direct" k1) looks natural and has an
    expected gradient of exactly 0, because E[grad log S(y)] = 0.

    Raises:
        ConfigError: for ``gradient="direct"``, and what every score function refuses.
    """

    gradient: Literal["score", "direct"] = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.gradient == "score",
            "estimator.gradient",
            'be "score" (the log-ratio of a sampled token, differentiated directly, has an expected '
            "gradient of exactly 0)",
            self.gradient,
            'use "score", or estimator=topk to differentiate a divergence',
        )

    def _returns(
        self, rewards: Float[Tensor, "batch time"], sampled: Bool[Tensor, "batch time"], progress: float
    ) -> Float[Tensor, "batch time"]:
        return masked_fill(rewards, sampled)
