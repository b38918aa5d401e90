"""EOPD's entropy gate."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.regularizer import _support
from opd_lightning.regularizer._terms import add
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class EntropyGate:
    """Adds the teacher's forward KL where the teacher is uncertain; the estimator stays on all tokens.

        estimator + coefficient 1[H_T > threshold] sum_{v in support} T(v) log(T(v) / S(v))

    EOPD (arXiv 2603.07079), on the student's own tokens. H_T is the teacher's entropy over the whole
    vocabulary, nats: no token passes a threshold above log(vocabulary), every token one below 0. S is from the
    full softmax; T is ``teacher_renormalised`` over the support (paper) or as it is (released code). Metrics:
    ``entropy_gate`` the gate, ``entropy_gate_fkl`` the divergence where it is open.

    Raises:
        ConfigError: for a ``threshold`` that is no number or a negative ``coefficient``, at any time.
    """

    threshold: float | Schedule = 0.8
    coefficient: float | Schedule = 1.0
    teacher_renormalised: bool = True

    needs: ClassVar[Needs] = Needs(teacher_entropy=True) | _support.NEEDS
    want: ClassVar[Want] = _support.WANT

    def __post_init__(self) -> None:
        name = "regularizer.entropy_gate"
        numbers = within(self.threshold, -math.inf, math.inf)
        require(numbers, f"{name}.threshold", "be a number of nats", self.threshold, "use 0.8, the paper's")
        require(
            within(self.coefficient, 0.0, sys.float_info.max),
            f"{name}.coefficient",
            "be a finite number of at least 0",
            self.coefficient,
            "use 1, the paper's",
        )

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with the forward KL added at the teacher's uncertain tokens."""
        if experience.teacher_entropy is None:
            raise ConfigError("the entropy gate needs the teacher's entropy")
        sampled = experience.rollout.sampled
        entropy = masked_fill(experience.teacher_entropy, sampled)
        gate = sampled & (entropy > value_at(self.threshold, progress))
        divergence = _support.teacher_forward_kl(
            scores, experience, gate, renormalised=self.teacher_renormalised
        )
        metrics = {"entropy_gate": gate.to(divergence.dtype), "entropy_gate_fkl": divergence.detach()}
        loss = replace(loss, metrics={**loss.metrics, **metrics})
        return add(loss, value_at(self.coefficient, progress) * divergence, gate)
