"""The mean over responses of each response's mean over tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SequenceMean:
    """Every response of the step counts the same, whatever its length.

    share = mask / (n_i * number of responses with n_i > 0, over all ranks), n_i tokens in the loss.
    It is what a token mean per micro-batch of one response amounts to. With ``per_origin`` the student's
    tokens have one such mean and all others another.
    """

    per_origin: bool = False

    def __call__(
        self, mask: Bool[Tensor, "batch time"], total: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch time"]:
        """Return the shares of this rank's whole optimizer step; all 0 where no token is in the loss."""
        length = mask.sum(-1, keepdim=True)
        responses = total((length > 0).sum().to(torch.float32))
        return mask / (length.clamp(min=1) * responses.clamp(min=1.0))
