"""The learning-rate schedule, and an optimizer's settings behind a checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

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


log = logging.getLogger(__name__)

_TOLD = (
    *("lr", "betas", "momentum", "weight_decay", "eps"),
    *("dampening", "nesterov", "foreach", "maximize", "alpha", "rho"),
)
"""Settings of an optimizer that its state does not depend on; with ``fused`` counts of steps lie on another device."""


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each group of weights."""
    return [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]


def settle(optimizer: Optimizer, settings: Sequence[Mapping[str, Any]], schedule: LRScheduler | None) -> None:
    """Give an optimizer that took its state from a checkpoint these settings, in place.

    The learning rate is that of the schedule over the steps that are planned now; a schedule that computes it from
    the one before keeps it. Settings that the state may depend on, as ``amsgrad``, stay those of the checkpoint,
    and are named where others were wanted.
    """
    kept = {
        name
        for group, own in zip(optimizer.param_groups, settings, strict=False)
        for name, value in own.items()
        if name not in (*_TOLD, "initial_lr") and name in group and group[name] != value
    }
    if kept:
        log.warning("the optimizer keeps its checkpoint's settings of %s", ", ".join(sorted(kept)))
    for index, (group, own) in enumerate(zip(optimizer.param_groups, settings, strict=False)):
        follows = isinstance(schedule, LambdaLR)
        group.update(
            {
                name: value
                for name, value in own.items()
                if name in _TOLD and (name != "lr" or schedule is None or follows)
            }
        )
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs[index] = group["initial_lr"] = own["lr"]
            group["lr"] = own["lr"] * schedule.lr_lambdas[index](schedule.last_epoch)
