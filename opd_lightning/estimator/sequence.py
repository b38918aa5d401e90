"""The sequence-level score-function estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from opd_lightning.estimator._score import score_function_loss
from opd_lightning.functional.returns import sequence_return
from opd_lightning.protocols import Reward
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Each token answers for the whole response: A_t = sum_t' r_t', value = -sg(A_t) log S(y_t).

    Unbiased for the gradient of KL(S(.|x) || T(.|x)) over responses, with the largest variance of all,
    O(n^4) in the length (Revisiting OPD, arXiv 2603.25562). The rewards to go
    (``estimator=discounted estimator.gamma=1``) have the same mean and less variance.
    """

    reward: Reward

    advantage: ClassVar[bool] = True
    want: ClassVar[Want] = Want(taken=True)

    @property
    def needs(self) -> Needs:
        """The teacher's log-prob of the taken token, and what the reward reads."""
        return Needs(teacher_taken=True) | self.reward.needs

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        return score_function_loss(self.reward, sequence_return, scores, experience)
