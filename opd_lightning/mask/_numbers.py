"""What the masks share: checking and reading their numbers, and what was collected for them."""

from __future__ import annotations

import math

from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.schedule import Schedule, value_at, within


def require_count(count: object, field: str) -> None:
    """Refuse a number of tokens below 1, or a schedule that goes there."""
    require(within(count, 1, math.inf), field, "be at least 1 token", count, "use 100, or a schedule")


def require_share(share: object, field: str, remedy: str) -> None:
    """Refuse a share outside [0, 1], or a schedule that goes there."""
    require(within(share, 0, 1), field, "be in [0, 1]", share, remedy)


def require_floor(floor: object, field: str) -> None:
    """Refuse a floor of r above 0, or a schedule that goes there."""
    holds = within(floor, -math.inf, 0)
    require(holds, field, "be at most 0", floor, "use -1.72, lambda = 0.3 in (log lambda) / (1 - lambda)")


def tokens_at(count: float | Schedule, progress: float) -> int:
    """Return a number of tokens, or a schedule of one at ``progress``, rounded, at least 1."""
    value = value_at(count, progress)
    return max(1, round(value)) if math.isfinite(value) else 2**62


def collected(values: Tensor | None, name: str) -> Tensor:
    """Return what a mask declared in its ``needs``."""
    if values is None:
        raise ValueError(f"{name} was declared as needed and not collected")
    return values
