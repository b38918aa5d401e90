"""The sequence-level score-function estimator."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.estimator._score import ScoreFunction
from opd_lightning.functional.returns import sequence_return


@dataclass(frozen=True, kw_only=True)
class Sequence(ScoreFunction):
    """Each token answers for the whole response: A_t = sum_t' r_t', value = -sg(A_t) log S(y_t).

    Unbiased for the gradient of KL(S(.|x) || T(.|x)) over responses, with the largest variance of all,
    O(n^4) in the length (Revisiting OPD, arXiv 2603.25562). The rewards to go
    (``estimator=discounted estimator.gamma=1``) have the same mean and less variance. ``baseline``,
    ``normalise`` and ``origins``: see :class:`~opd_lightning.estimator._score.ScoreFunction`.
    """

    def _returns(
        self, rewards: Float[Tensor, "batch time"], sampled: Bool[Tensor, "batch time"], progress: float
    ) -> Float[Tensor, "batch time"]:
        return sequence_return(rewards, sampled)
