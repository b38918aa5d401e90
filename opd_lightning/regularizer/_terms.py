"""How a regularizer adds a term of its own to a loss."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional.masked import masked_fill
from opd_lightning.types import TokenLoss


def add(loss: TokenLoss, term: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> TokenLoss:
    """Return the loss with ``term`` added on the tokens of ``mask``, whatever weights came before.

    A weight belongs to what was there when it was set: it is folded into that value, and into the advantage
    behind it, and the new weight is 1 on all tokens that either part puts in the loss. So a gate that stands
    before the term in the list leaves the term alone, and one that stands after it scales both.
    What stands outside ``mask`` in ``term``, or where the old weight is 0, never matters.
    """
    counted = loss.weight != 0
    value = masked_fill(loss.value, counted) * loss.weight + masked_fill(term, mask)
    advantage = loss.advantage
    if advantage is not None:
        advantage = masked_fill(advantage, counted) * loss.weight
    return replace(loss, value=value, weight=(counted | mask).to(value.dtype), advantage=advantage)
