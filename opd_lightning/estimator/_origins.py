"""Whose tokens an estimator teaches, and with what weight."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Origin, Rollout

Scales = Mapping[str, float | Schedule]


def check_scales(scales: Scales | None, taught: frozenset[Origin], field: str) -> None:
    """Refuse a scale that is no finite number of at least 0, or that belongs to no taught origin."""
    for name, scale in (scales or {}).items():
        known = {origin.name.lower() for origin in taught}
        require(name in known, field, f"name origins out of {', '.join(sorted(known))}", name, "leave it out")
        finite = within(scale, 0.0, sys.float_info.max)
        require(finite, f"{field}.{name}", "be a finite number of at least 0", scale, "use 1 for no scale")


def origin_weight(
    rollout: Rollout, taught: frozenset[Origin], scales: Scales | None, progress: float, dtype: torch.dtype
) -> Float[Tensor, "batch time"]:
    """Return 1, or the origin's scale, at the taught tokens inside the horizon, and 0 elsewhere."""
    weight = rollout.written_by(taught).to(dtype)
    for name, scale in (scales or {}).items():
        here = rollout.origin == Origin[name.upper()]
        weight = torch.where(here, weight * value_at(scale, progress), weight)
    return weight
