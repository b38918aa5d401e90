"""The score-function estimator with discounted credit."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.estimator._score import ScoreFunction
from opd_lightning.functional.returns import discounted_return
from opd_lightning.schedule import Schedule, value_at, within


@dataclass(frozen=True, kw_only=True)
class Discounted(ScoreFunction):
    """Each token answers for what follows it: A_t = r_t + gamma A_{t+1}, value = -sg(A_t) log S(y_t).

    gamma = 0 is the token-level estimator, gamma = 1 the rewards to go, which have the gradient of the
    sequence-level reverse KL in expectation (Revisiting OPD, arXiv 2603.25562). The return
    restarts wherever a token is not the student's own. ``baseline``, ``normalise`` and ``origins``: see
    :class:`~opd_lightning.estimator._score.ScoreFunction`.

    Raises:
        ConfigError: if ``gamma`` leaves [0, 1] at any time, and what every score function refuses.
    """

    gamma: float | Schedule

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            within(self.gamma, 0.0, 1.0),
            "estimator.gamma",
            "be in [0, 1]",
            self.gamma,
            "use 0 for token-level credit and 1 for the rewards to go",
        )

    def _returns(
        self, rewards: Float[Tensor, "batch time"], sampled: Bool[Tensor, "batch time"], progress: float
    ) -> Float[Tensor, "batch time"]:
        return discounted_return(rewards, sampled, gamma=value_at(self.gamma, progress))
