"""No support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.types import Candidates, Needs


@dataclass(frozen=True, kw_only=True)
class NoSupport:
    """Nothing is compared beside the taken token: enough for the score-function estimators."""

    needs: ClassVar[Needs] = Needs()
    size: ClassVar[int | None] = None

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return a selection without ids."""
        ids = candidates.taken.unsqueeze(-1)[..., :0]
        return ids, torch.ones_like(ids, dtype=torch.bool)
