"""The student's most likely tokens and the taken one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.support._select import first, require_k, with_taken
from opd_lightning.types import Candidates, Needs


@dataclass(frozen=True, kw_only=True)
class StudentAugmented:
    """The student's ``k`` most likely ids at collection, and the taken token where it is not one of them.

    Revisiting OPD, arXiv 2603.25562, variant V2. The teacher must be able to score given ids.
    """

    k: int

    follows_taken: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_k(self.k)

    @property
    def needs(self) -> Needs:
        """The student's top ids."""
        return Needs(support=True, student_top=self.k)

    @property
    def size(self) -> int | None:
        """Most ids at a position."""
        return self.k + 1

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return the ids; the last column is the taken token, valid only if it is new."""
        return with_taken(first(candidates.student_top, self.k, "student"), candidates.taken)
