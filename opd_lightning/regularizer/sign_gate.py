"""AOPD's sign gate."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.regularizer import _support
from opd_lightning.regularizer._terms import add
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class SignGate:
    """Puts the teacher's forward KL in place of the estimator where the teacher likes the token less.

        g = 1[T(y) - S(y) <= threshold],    (1 - g) estimator + g coefficient sum_{v in support} T log(T/S)

    AOPD (arXiv 2605.06387). At threshold 0 that is r <= 0, at -1 the plain estimator, at 1 forward KL on all
    of the student's tokens; other tokens stay as they are. The gate reads the current student, detached; S is
    from the full softmax, T as it is or ``teacher_renormalised`` over the support. The metric ``sign_gate`` is g.

    Raises:
        ConfigError: for a ``threshold`` outside [-1, 1] or a negative ``coefficient``, at any time.
    """

    threshold: float | Schedule = 0.0
    coefficient: float | Schedule = 1.0
    teacher_renormalised: bool = False

    needs: ClassVar[Needs] = Needs(teacher_taken=True) | _support.NEEDS
    want: ClassVar[Want] = Want(taken=True) | _support.WANT

    def __post_init__(self) -> None:
        for name, low, high, remedy in (
            ("threshold", -1.0, 1.0, "use 0 for the sign of the log-ratio"),
            ("coefficient", 0.0, sys.float_info.max, "use 1"),
        ):
            value = getattr(self, name)
            condition = f"be in [{low:g}, {high:g}]" if high == 1.0 else "be a finite number of at least 0"
            require(within(value, low, high), f"regularizer.sign_gate.{name}", condition, value, remedy)

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with the gated tokens' estimator replaced."""
        gate = self._gate(scores, experience, progress)
        divergence = _support.teacher_forward_kl(
            scores, experience, gate, renormalised=self.teacher_renormalised
        )
        metrics = {"sign_gate": gate.to(divergence.dtype), "sign_gate_fkl": divergence.detach()}
        loss = replace(loss, weight=loss.weight * ~gate, metrics={**loss.metrics, **metrics})
        return add(loss, value_at(self.coefficient, progress) * divergence, gate)

    def _gate(self, scores: Scores, experience: Experience, progress: float) -> Tensor:
        if scores.taken_logp is None or experience.teacher_taken_logp is None:
            raise ConfigError("the sign gate needs both models' log-probs of the taken token")
        sampled = experience.rollout.sampled
        student = masked_fill(scores.taken_logp.detach(), sampled).exp()
        teacher = masked_fill(experience.teacher_taken_logp, sampled).exp()
        return sampled & (teacher - student <= value_at(self.threshold, progress))
