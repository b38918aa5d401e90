"""The teacher's most likely tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.support._select import first, require_k
from opd_lightning.types import Candidates, Needs


@dataclass(frozen=True, kw_only=True)
class TeacherTopK:
    """The teacher's ``k`` most likely ids (local support matching, arXiv 2603.25562)."""

    k: int

    def __post_init__(self) -> None:
        require_k(self.k)

    @property
    def needs(self) -> Needs:
        """The teacher's top ids."""
        return Needs(support=True, teacher_top=self.k)

    @property
    def size(self) -> int | None:
        """Most ids at a position."""
        return self.k

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return the ids, all valid."""
        ids = first(candidates.teacher_top, self.k, "teacher")
        return ids, torch.ones_like(ids, dtype=torch.bool)
