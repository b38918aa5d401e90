"""What the supports share: their one number, and cutting a model's top ids to it."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from opd_lightning.errors import require


def require_k(k: int) -> None:
    """Refuse a ``k`` that is not a positive whole number."""
    whole = isinstance(k, int) and not isinstance(k, bool)
    require(whole and k >= 1, "support.k", "be a whole number of at least 1", k, "use 16")


def first(top_ids: Int[Tensor, "batch time top"] | None, k: int, model: str) -> Int[Tensor, "batch time k"]:
    """Return the first ``k`` top ids; other parts may have asked for more, a small vocabulary has fewer."""
    if top_ids is None:
        raise ValueError(f"the {model}'s top ids were declared as needed and not collected")
    return top_ids[..., :k]
