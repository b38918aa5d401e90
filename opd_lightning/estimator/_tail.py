"""What the two estimators with a sampled tail share."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.comparison import full_term
from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.divergence import reverse_kl
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.ratio import importance_weight
from opd_lightning.functional.tail import Correction, head_with_sampled_tail
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, FullTerm, Needs, Scores, TokenLoss, Want

_FULL = FullTerm("teacher", reverse_kl)


@dataclass(frozen=True, kw_only=True)
class SampledTail:
    """value_t = the exact head on the support + a sample of all the rest, from the taken token.

    See :func:`~opd_lightning.functional.tail.head_with_sampled_tail`, whose ``correction`` a subclass names.
    ``tail_weight`` is False for none, or the largest w = S(y_t) / (probability of y_t under the sampler that
    drew it), held fixed, by which the tail is multiplied; a number or a schedule, infinity for no largest. On the
    full support there is no tail, and the value is KL(S||T).

    Raises:
        ConfigError: for a ``tail_weight`` that is neither; on a call without a support.
    """

    tail_weight: float | Schedule | Literal[False] = False

    needs: ClassVar[Needs] = Needs(support=True, least_support=1, teacher_taken=True)
    want: ClassVar[Want] = Want(taken=True, support="exact", full=frozenset({_FULL}))

    def __post_init__(self) -> None:
        number = self.tail_weight is not True and within(self.tail_weight, sys.float_info.min, math.inf)
        holds = self.tail_weight is False or number
        condition = "be false or a number above 0, the largest weight"
        require(holds, "estimator.tail_weight", condition, self.tail_weight, "use false for none")

    def _correction(self) -> Correction:
        raise NotImplementedError

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        sampled = experience.rollout.sampled
        if experience.teacher_hidden is not None:
            value = full_term(scores, _FULL)
        else:
            value = self._on_support(scores, experience, sampled, progress)
        value = masked_fill(value, sampled)
        metrics = {"divergence": value.detach()}
        return TokenLoss(value=value, weight=sampled.to(value.dtype), metrics=metrics)

    def _on_support(
        self, scores: Scores, experience: Experience, sampled: Bool[Tensor, "batch time"], progress: float
    ) -> Float[Tensor, "batch time"]:
        rollout, taken_logp, taught_logp = (
            experience.rollout,
            scores.taken_logp,
            experience.teacher_taken_logp,
        )
        student, teacher = scores.support_logp, experience.support_teacher_logp
        ids, exists = experience.support_ids, experience.support_valid
        if student is None or teacher is None or ids is None or exists is None:
            raise ConfigError(
                "`estimator` with a tail must have a support as its head, got none; use support=teacher"
            )
        if taken_logp is None or taught_logp is None:
            raise ConfigError("`estimator` with a tail needs both models' log-probs of the taken token")
        valid = exists & sampled.unsqueeze(-1)
        taken = masked_fill(taken_logp, sampled)
        weight = None
        if self.tail_weight is not False:
            drawn = masked_fill(rollout.behavior_logp, sampled)
            weight = importance_weight(taken, drawn, cap=value_at(self.tail_weight, progress))
        return head_with_sampled_tail(
            student,
            teacher,
            valid,
            taken,
            masked_fill(taught_logp, sampled),
            ((ids == rollout.ids.unsqueeze(-1)) & valid).any(-1) | ~sampled,
            correction=self._correction(),
            weight=weight,
        )
