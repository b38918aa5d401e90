"""What a loop asks of a model that it runs token by token."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Steps(Protocol):
    """A model, token by token: the fast decoder, as it is or in fixed memory, or the library's forward.

    A state has a method ``keep(order)`` that returns the state of those rows.
    """

    def prefill(
        self, ids: Int[Tensor, "batch prompt"], mask: Bool[Tensor, "batch prompt"], budget: int
    ) -> tuple[Float[Tensor, "batch vocab"], Any]:
        """Read left-padded prompts; return the logits after the last token and the state to go on from."""
        ...

    def step(self, ids: Int[Tensor, " batch"], state: Any) -> tuple[Float[Tensor, "batch vocab"], Any]:
        """Read one more token of every row; return the logits after it and the new state."""
        ...
