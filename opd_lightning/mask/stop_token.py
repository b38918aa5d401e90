"""The mask that leaves the decision to stop out of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from opd_lightning.types import Experience, Finish, Needs
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class StopToken:
    """Takes the token that ends a response out of the loss; a response that was cut has none.

    ESR's code (arXiv 2605.27028) trims it from early-stopped and whole responses alike: the decision to
    stop is never supervised, and the collapse that the paper reports of whole responses was measured so.
    """

    needs: ClassVar[Needs] = Needs()

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        rollout = experience.rollout
        behind = rollout.mask.flip(-1).cumsum(-1).flip(-1)  # response tokens from here on
        last = rollout.mask & (behind == 1)
        return inside & ~(last & (rollout.finish == Finish.EOS).unsqueeze(-1))
