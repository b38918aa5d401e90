"""The most likely tokens of both models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.support._select import first, require_k
from opd_lightning.types import Candidates, Needs


@dataclass(frozen=True, kw_only=True)
class Union:
    """The teacher's and the student's ``k`` most likely ids, each id counted once.

    The teacher must be able to score given ids.
    """

    k: int

    def __post_init__(self) -> None:
        require_k(self.k)

    @property
    def needs(self) -> Needs:
        """Both models' top ids."""
        return Needs(support=True, teacher_top=self.k, student_top=self.k)

    @property
    def size(self) -> int | None:
        """Most ids at a position."""
        return 2 * self.k

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return the teacher's ids, then the student's; those of the student's already there are invalid."""
        teacher = first(candidates.teacher_top, self.k, "teacher")
        student = first(candidates.student_top, self.k, "student")
        new = (student.unsqueeze(-1) != teacher.unsqueeze(-2)).all(-1)
        valid = torch.cat([torch.ones_like(teacher, dtype=torch.bool), new], dim=-1)
        return torch.cat([teacher, student], dim=-1), valid
