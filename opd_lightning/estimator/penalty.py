"""A penalty on the sampled token, differentiated directly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.penalty import PENALTIES, Penalty
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want

_GRADIENT_OF = {"k2": "reverse_kl", "k3": "forward_kl", "absolute": "none"}


@dataclass(frozen=True, kw_only=True)
class SampledPenalty:
    """value_t = a penalty on d = log S(y_t) - log T(y_t), differentiated through S, on the student's own tokens.

    ``of`` says which divergence's gradient that is in expectation at a prefix, so that nobody mistakes it
    (see :mod:`~opd_lightning.functional.penalty`): k2 = d^2 / 2 that of ``reverse_kl`` (KDRL, arXiv 2506.02208),
    k3 = e^-d + d - 1 that of ``forward_kl``, and absolute = |d| that of ``none``. k1 = d itself is refused.

    Raises:
        ConfigError: for k1, an unknown ``kind``, or an ``of`` that is not the kind's.
    """

    kind: Penalty
    of: Literal["reverse_kl", "forward_kl", "none"]

    needs: ClassVar[Needs] = Needs(teacher_taken=True)
    want: ClassVar[Want] = Want(taken=True)

    def __post_init__(self) -> None:
        names = ", ".join(_GRADIENT_OF)
        condition = f"be one of {names}"
        if self.kind == "k1":
            condition += " (k1, differentiated directly, has an expected gradient of exactly 0)"
        remedy = "use k2, or estimator=token for k1 as an advantage"
        require(self.kind in _GRADIENT_OF, "estimator.kind", condition, self.kind, remedy)
        right = _GRADIENT_OF[self.kind]
        condition = f"be {right} for {self.kind} (that is what its expected gradient belongs to)"
        require(self.of == right, "estimator.of", condition, self.of, f"use estimator.of={right}")

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        if scores.taken_logp is None or experience.teacher_taken_logp is None:
            raise ConfigError("`estimator=penalty` needs both models' log-probs of the taken token")
        sampled = experience.rollout.sampled
        student = masked_fill(scores.taken_logp, sampled)
        teacher = masked_fill(experience.teacher_taken_logp, sampled)
        value = PENALTIES[self.kind](student, teacher)
        metrics = {"log_ratio": log_ratio(student.detach(), teacher)}
        return TokenLoss(value=value, weight=sampled.to(value.dtype), metrics=metrics)
