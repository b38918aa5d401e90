"""The taken token alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.types import Candidates, Needs


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The one token that was taken; with a tail bucket, taken against not taken.

    That two-category divergence is *not* an estimate of reverse KL: its expected gradient weighs each
    token by S(y) once more.
    """

    needs: ClassVar[Needs] = Needs(support=True)
    size: ClassVar[int | None] = 1
    follows_taken: ClassVar[bool] = True

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return the taken ids, all valid."""
        ids = candidates.taken.unsqueeze(-1)
        return ids, torch.ones_like(ids, dtype=torch.bool)
