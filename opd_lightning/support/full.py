"""The whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.types import Candidates, Needs


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every id, compared from the hidden states of both models and never listed.

    The teacher must run in this process: one that is served sends log-probs, not hidden states.
    """

    needs: ClassVar[Needs] = Needs(support=True, full=True)
    size: ClassVar[int | None] = None

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return a selection without ids: the experience holds the teacher's hidden states instead."""
        ids = candidates.taken.unsqueeze(-1)[..., :0]
        return ids, torch.ones_like(ids, dtype=torch.bool)
