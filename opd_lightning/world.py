"""This process among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class World:
    """Rank and number of processes, and what lets a part see numbers of all of them.

    ``total`` sums a tensor over the processes; ``gather`` joins 1-d tensors, which may differ in length, in
    the order of ranks. Both must be called by every process.
    """

    rank: int = 0
    size: int = 1
    total: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    gather: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
