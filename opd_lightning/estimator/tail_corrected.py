"""The head with a sampled tail, corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opd_lightning.errors import require
from opd_lightning.estimator._tail import SampledTail
from opd_lightning.functional.tail import Correction


@dataclass(frozen=True, kw_only=True)
class TailCorrected(SampledTail):
    """Variants V4 and V5 of Revisiting OPD, arXiv 2603.25562, with E[grad] = grad KL(S||T) exactly.

    ``correction``: ``plus_one`` gives the tail's gradient the missing "+1"; ``generalised`` takes the generalised
    reverse KL as the head, whose value differs in the mean by P_T - P_S. Our corrections, not the paper's.

    Raises:
        ConfigError: for another ``correction``.
    """

    correction: Literal["plus_one", "generalised"] = "plus_one"

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = self.correction in ("plus_one", "generalised")
        condition = "be plus_one or generalised"
        remedy = "use estimator=tail_published for no correction"
        require(holds, "estimator.correction", condition, self.correction, remedy)

    def _correction(self) -> Correction:
        return self.correction
