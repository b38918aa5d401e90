"""What the score-function estimators share."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.protocols import Reward
from opd_lightning.types import Experience, Scores, TokenLoss

Returns = Callable[[Float[Tensor, "batch time"], Bool[Tensor, "batch time"]], Float[Tensor, "batch time"]]


def score_function_loss(
    reward: Reward, returns: Returns, scores: Scores, experience: Experience
) -> TokenLoss:
    """Return value = -sg(A) log S(y) with A the returns of the rewards over the sampled tokens.

    Its gradient is -A grad log S(y), the policy gradient of A. Both run over ``rollout.sampled`` and
    not over the loss mask: a token that teaches nothing still happened, so it does not cut the credit
    of the tokens before it.
    """
    if scores.taken_logp is None or experience.teacher_taken_logp is None:
        raise ConfigError("a score-function estimator needs both models' log-probs of the taken token")
    sampled = experience.rollout.sampled
    student = masked_fill(scores.taken_logp, sampled)
    teacher = masked_fill(experience.teacher_taken_logp, sampled)
    advantage = returns(reward(student.detach(), teacher, experience), sampled).detach()
    return TokenLoss(
        value=-advantage * student,
        weight=sampled.to(student.dtype),
        advantage=advantage,
        metrics={"log_ratio": log_ratio(student.detach(), teacher), "advantage": advantage},
    )
