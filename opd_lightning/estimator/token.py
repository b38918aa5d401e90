"""The token-level score-function estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from opd_lightning.errors import require
from opd_lightning.estimator._score import score_function_loss
from opd_lightning.functional.masked import masked_fill
from opd_lightning.protocols import Reward
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class Token:
    """Each token answers for its own reward: A_t = r_t, value = -sg(r_t) log S(y_t).

    The expected gradient at a prefix is exactly that of KL(S||T) there. Over a response it leaves out
    how a token changes the prefixes after it, a bias bought for a variance of O(n^2) in place of
    O(n^4) (Revisiting OPD, arXiv 2603.25562).

    ``gradient`` has one legal value. Differentiating -r itself ("direct" k1) looks natural and has an
    expected gradient of exactly 0, because E[grad log S(y)] = 0.

    Raises:
        ConfigError: for ``gradient="direct"``.
    """

    reward: Reward
    gradient: Literal["score", "direct"] = "score"

    advantage: ClassVar[bool] = True
    want: ClassVar[Want] = Want(taken=True)

    @property
    def needs(self) -> Needs:
        """The teacher's log-prob of the taken token, and what the reward reads."""
        return Needs(teacher_taken=True) | self.reward.needs

    def __post_init__(self) -> None:
        require(
            self.gradient == "score",
            "estimator.gradient",
            'be "score" (the log-ratio of a sampled token, differentiated directly, has an expected '
            "gradient of exactly 0)",
            self.gradient,
            'use "score", or estimator=topk to differentiate a divergence',
        )

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        return score_function_loss(self.reward, masked_fill, scores, experience)
