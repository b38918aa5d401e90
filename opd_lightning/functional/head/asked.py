"""The gradient of those logits of a tile that are asked for by id."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.functional.head.spec import Finish


@dataclass(frozen=True, kw_only=True)
class AskedGradient:
    """The whole gradient of the asked raw products, in at least float32, each id of a row in one slot only.

    A likely id gets pull (1 - p). In a tile that is kept in bfloat16 nothing would be left of it if -pull p
    and pull were each rounded on its own.
    """

    ids: Int[Tensor, "n k"]
    first: Bool[Tensor, "n k"]
    grad: Float[Tensor, "n k"]

    @classmethod
    def of(
        cls,
        ids: Int[Tensor, "n k"],
        pull: Float[Tensor, "n k"],
        logits: Float[Tensor, "n k"],
        finish: Finish,
        lse: Float[Tensor, " n"],
        entropy: Float[Tensor, " n"] | None,
        entropy_pull: Float[Tensor, " n"] | None,
    ) -> AskedGradient:
        """Return the gradient of ``sum_j pull_j log p(ids_j) + entropy_pull * H``, ``logits`` those of ``ids``.

        d/dz_v = sum_j [ids_j = v] pull_j - p_v (sum_j pull_j + entropy_pull (log p_v + H))
        """
        ids, order = ids.sort(-1)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        number = first.cumsum(-1) - 1
        own = torch.zeros_like(pull).scatter_add_(-1, number, pull.gather(-1, order)).gather(-1, number)
        logits = logits.gather(-1, order)
        logp, dense = logits - lse.unsqueeze(-1), pull.sum(-1, keepdim=True)
        if entropy is not None and entropy_pull is not None:
            dense = dense + entropy_pull.unsqueeze(-1) * (logp + entropy.unsqueeze(-1))
        return cls(ids=ids, first=first, grad=finish.pull_back_(own - logp.exp() * dense, logits))

    def write(self, tile: Float[Tensor, "rows v"], t: slice, v: slice) -> None:
        """Put what falls into the tile of positions ``t`` and ids ``v`` in the place of what is there."""
        inside, place = placed(self.ids[t], v)
        inside &= self.first[t]
        # Two additions and no assignment, since slots of other tiles need a place, too: both sums are exact.
        tile.scatter_add_(-1, place, torch.where(inside, -tile.gather(-1, place), 0.0))
        tile.scatter_add_(-1, place, torch.where(inside, self.grad[t].to(tile.dtype), 0.0))


def placed(ids: Int[Tensor, "n k"], v: slice) -> tuple[Bool[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Return which ids fall into a slice of the vocabulary, and their places there (0 for the others)."""
    inside = (ids >= v.start) & (ids < v.stop)
    return inside, torch.where(inside, ids - v.start, 0)
