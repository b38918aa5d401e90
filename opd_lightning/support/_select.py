"""What the supports share: their one number, cutting top ids to it, and the taken token behind them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.schedule import require_plain


def require_k(k: int) -> None:
    """Refuse a ``k`` that is not a positive whole number."""
    require_plain(k, "support.k", "use 16")
    whole = isinstance(k, int) and not isinstance(k, bool)
    require(whole and k >= 1, "support.k", "be a whole number of at least 1", k, "use 16")


def first(top_ids: Int[Tensor, "batch time top"] | None, k: int, model: str) -> Int[Tensor, "batch time k"]:
    """Return the first ``k`` top ids; other parts may have asked for more, a small vocabulary has fewer."""
    if top_ids is None:
        raise ValueError(f"the {model}'s top ids were declared as needed and not collected")
    return top_ids[..., :k]


def with_taken(
    top: Int[Tensor, "batch time k"], taken: Int[Tensor, "batch time"]
) -> tuple[Int[Tensor, "batch time k+1"], Bool[Tensor, "batch time k+1"]]:
    """Return ``top`` and the taken id behind it, which is valid only where it is new."""
    taken = taken.unsqueeze(-1)
    new = (top != taken).all(-1, keepdim=True)
    return torch.cat([top, taken], dim=-1), torch.cat([torch.ones_like(top, dtype=torch.bool), new], dim=-1)
