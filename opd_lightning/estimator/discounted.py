"""The score-function estimator with discounted credit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from opd_lightning.errors import require
from opd_lightning.estimator._score import score_function_loss
from opd_lightning.functional.returns import discounted_return
from opd_lightning.protocols import Reward
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class Discounted:
    """Each token answers for what follows it: A_t = r_t + gamma A_{t+1}, value = -sg(A_t) log S(y_t).

    gamma = 0 is the token-level estimator, gamma = 1 the rewards to go, which have the gradient of the
    sequence-level reverse KL in expectation (Revisiting OPD, arXiv 2603.25562). The return
    restarts wherever a token is not the student's own.

    Raises:
        ConfigError: if ``gamma`` leaves [0, 1] at any time.
    """

    reward: Reward
    gamma: float | Schedule

    advantage: ClassVar[bool] = True
    want: ClassVar[Want] = Want(taken=True)

    @property
    def needs(self) -> Needs:
        """The teacher's log-prob of the taken token, and what the reward reads."""
        return Needs(teacher_taken=True) | self.reward.needs

    def __post_init__(self) -> None:
        require(
            within(self.gamma, 0.0, 1.0),
            "estimator.gamma",
            "be in [0, 1]",
            self.gamma,
            "use 0 for token-level credit and 1 for the rewards to go",
        )

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        returns = partial(discounted_return, gamma=value_at(self.gamma, progress))
        return score_function_loss(self.reward, returns, scores, experience)
