"""The learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from opd_lightning.errors import require


@dataclass(frozen=True, kw_only=True)
class WarmupDecay:
    """Linear warm-up, then a decay to ``final`` times the learning rate at the last planned step.

    Args:
        warmup_steps: optimizer steps until the full learning rate.
        final: share of the learning rate that is left at the end, in [0, 1].
        shape: ``"linear"``, ``"cosine"`` or ``"constant"`` (no decay).
    """

    warmup_steps: int
    final: float
    shape: Literal["linear", "cosine", "constant"]

    def __post_init__(self) -> None:
        require(
            self.warmup_steps >= 0,
            "scheduler.warmup_steps",
            "be at least 0",
            self.warmup_steps,
            "use 0 for none",
        )
        require(0 <= self.final <= 1, "scheduler.final", "be in [0, 1]", self.final, "use 0.1")
        shapes = ("linear", "cosine", "constant")
        require(
            self.shape in shapes,
            "scheduler.shape",
            f"be one of {', '.join(shapes)}",
            self.shape,
            "use linear",
        )

    def factor(self, step: int, planned: int) -> float:
        """Return the factor on the learning rate of optimizer step ``step`` (from 0) of ``planned``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        done = min((step - self.warmup_steps) / max(planned - self.warmup_steps, 1), 1.0)
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left

    def __call__(self, optimizer: Optimizer, planned: int) -> LambdaLR:
        """Return the scheduler of ``optimizer`` over ``planned`` optimizer steps."""
        return LambdaLR(optimizer, lambda step: self.factor(step, planned))
