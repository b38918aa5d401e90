"""A score function on every candidate of the support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd_lightning.comparison import full_term
from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.candidates import (
    CANDIDATE_WEIGHTS,
    CandidateWeight,
    candidate_loss,
    candidate_weights,
)
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.types import Experience, FullTerm, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True)
class _OverAll:
    """The loss over the whole vocabulary, for a full term."""

    weight: CandidateWeight

    def __call__(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        valid = torch.ones_like(student_logp, dtype=torch.bool)
        return candidate_loss(student_logp, teacher_logp, valid, self.weight)


@dataclass(frozen=True, kw_only=True)
class PerCandidate:
    """value_t = -sum_k sg(A_k) log S_k with A_k = -w_k (log S_k - log T_k), over the support of position t.

    A policy gradient in which every candidate answers for itself (Rethinking OPD, arXiv 2604.13016). ``weight``:
    the current ``student``, the ``teacher`` or ``uniform``, each renormalised on the support, or
    ``student_full``: S as it is. The last has exactly the support's part of the gradient of KL(S||T); the first
    the same divided by the student's mass on the support. Log-ratios are those of the whole vocabulary.

    Raises:
        ConfigError: for an unknown ``weight``; on a call without a support.
    """

    weight: CandidateWeight

    needs: ClassVar[Needs] = Needs(support=True, least_support=1)

    def __post_init__(self) -> None:
        words = ", ".join(CANDIDATE_WEIGHTS)
        known = self.weight in CANDIDATE_WEIGHTS
        require(known, "estimator.weight", f"be one of {words}", self.weight, "use student, the paper's")

    @property
    def want(self) -> Want:
        """Exact log-probs on the support."""
        return Want(support="exact", full=frozenset({FullTerm("teacher", _OverAll(self.weight))}))

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        sampled = experience.rollout.sampled
        if experience.teacher_hidden is not None:
            value = masked_fill(full_term(scores, FullTerm("teacher", _OverAll(self.weight))), sampled)
            return TokenLoss(value=value, weight=sampled.to(value.dtype))
        student, teacher = scores.support_logp, experience.support_teacher_logp
        if student is None or teacher is None or experience.support_valid is None:
            raise ConfigError("`estimator=candidates` must have a support, got none; use support=student")
        valid = experience.support_valid & sampled.unsqueeze(-1)
        value = candidate_loss(student, teacher, valid, self.weight)
        weights = candidate_weights(student, teacher, valid, self.weight)
        ratio = torch.where(valid, log_ratio(student, teacher), 0.0).detach()
        metrics = {"log_ratio": (weights * ratio).sum(-1)}
        return TokenLoss(value=value, weight=sampled.to(value.dtype), metrics=metrics)
