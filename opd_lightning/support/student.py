"""The student's most likely tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.support._select import first, require_k
from opd_lightning.types import Candidates, Needs


@dataclass(frozen=True, kw_only=True)
class StudentTopK:
    """The ``k`` most likely ids of the student at collection, where its own mass is.

    The teacher must be able to score given ids.
    """

    k: int

    def __post_init__(self) -> None:
        require_k(self.k)

    @property
    def needs(self) -> Needs:
        """The student's top ids."""
        return Needs(support=True, student_top=self.k)

    @property
    def size(self) -> int | None:
        """Most ids at a position."""
        return self.k

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return the ids, all valid."""
        ids = first(candidates.student_top, self.k, "student")
        return ids, torch.ones_like(ids, dtype=torch.bool)
