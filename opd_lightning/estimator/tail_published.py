"""The head with a sampled tail, as published."""

from __future__ import annotations

from dataclasses import dataclass

from opd_lightning.estimator._tail import SampledTail
from opd_lightning.functional.tail import Correction


@dataclass(frozen=True, kw_only=True)
class TailPublished(SampledTail):
    """Variants V4 (support=student) and V5 (support=teacher) of Revisiting OPD, arXiv 2603.25562, as published.

    The mean of the value is KL(S||T), and yet E[grad] = grad KL(S||T) + grad P_S, with P_S the student's mass on
    the support: the head's gradient has a "+1" that the tail's lacks, so that mass is pushed off the support.
    ``estimator=tail_corrected`` has the exact gradient.
    """

    def _correction(self) -> Correction:
        return "none"
