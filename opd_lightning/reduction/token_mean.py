"""The mean over all tokens of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenMean:
    """Every token of the step counts the same, so a long response counts more than a short one.

    share = mask / (number of tokens in the loss, over all rows, micro-batches and ranks)

    With ``per_origin`` the student's tokens have one such mean and all others another.
    """

    per_origin: bool = False

    def __call__(
        self, mask: Bool[Tensor, "batch time"], total: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch time"]:
        """Return the shares of this rank's whole optimizer step; all 0 where no token is in the loss."""
        count = total(mask.sum().to(torch.float32))
        return mask / count.clamp(min=1.0)
