"""The teacher's most likely tokens and the taken one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.support._select import first, require_k, with_taken
from opd_lightning.types import Candidates, Needs


@dataclass(frozen=True, kw_only=True)
class Augmented:
    """The teacher's ``k`` most likely ids, and the taken token where it is not one of them.

    The taken token then always receives a gradient (Revisiting OPD, arXiv 2603.25562, variant V3).
    """

    k: int

    follows_taken: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_k(self.k)

    @property
    def needs(self) -> Needs:
        """The teacher's top ids."""
        return Needs(support=True, teacher_top=self.k)

    @property
    def size(self) -> int | None:
        """Most ids at a position."""
        return self.k + 1

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return the ids; the last column is the taken token, valid only if it is new."""
        return with_taken(first(candidates.teacher_top, self.k, "teacher"), candidates.taken)
