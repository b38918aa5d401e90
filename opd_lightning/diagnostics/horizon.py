"""Where along a response the divergence lies, and the horizon that holds a given share of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from opd_lightning.errors import require

LEAST = 1e-6
"""Nats a token below which two models are the same but for rounding."""


@dataclass(frozen=True, kw_only=True)
class DivergenceByPosition:
    """Sums over responses of a per-token divergence, by position in the response.

    Responses end at different positions. A cumulative mean at N is the sum over responses and over their
    first N tokens, divided by the number of all responses, ended ones included: what a response has on
    average spent by then. So a position that few responses reach counts little, and the curve only grows.

    ``summed`` is in nats, ``tokens`` counts the responses that reach a position.
    """

    responses: int = 0
    summed: Float[Tensor, " time"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    tokens: Int[Tensor, " time"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def add(
        self, divergence: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
    ) -> DivergenceByPosition:
        """Return this with more responses, which may be longer; what stands outside ``mask`` never matters."""
        summed = torch.where(mask, divergence.double(), 0.0).sum(0).cpu()
        tokens = mask.sum(0).cpu()
        width = max(len(self.summed), len(summed))
        joined = [
            F.pad(a, (0, width - len(a))) + F.pad(b, (0, width - len(b)))
            for a, b in ((self.summed, summed), (self.tokens, tokens))
        ]
        return DivergenceByPosition(responses=self.responses + len(mask), summed=joined[0], tokens=joined[1])

    @property
    def mean(self) -> Float[Tensor, " time"]:
        """Mean at each position over the responses that reach it, nats; 0 where none does."""
        return self.summed / self.tokens.clamp(min=1)

    @property
    def cumulative(self) -> Float[Tensor, " time"]:
        """Mean over all responses of the divergence up to and including each position, nats."""
        return self.summed.cumsum(0) / max(self.responses, 1)

    @property
    def share(self) -> Float[Tensor, " time"]:
        """Cumulative mean over its last value.

        Raises:
            ConfigError: there is no divergence to share out.
        """
        total, tokens = float(self.summed.sum()), int(self.tokens.sum())
        apart = tokens > 0 and total > LEAST * tokens
        remedy = "choose a teacher that differs from the student"
        require(apart, "teacher.path", "diverge from the student", f"{total:.3g} nats in all", remedy)
        return self.cumulative / self.cumulative[-1]

    def horizon(self, share: float) -> int:
        """Return the least N whose first N positions hold at least ``share`` of the whole divergence.

        The rule of ESR's authors for N, with share 0.45 (arXiv 2605.27028, their code's notes).

        Raises:
            ConfigError: there is no divergence to share out.
        """
        reached = self.share >= share - 1e-12  # the last value is 1 but for rounding
        return int(reached.int().argmax()) + 1

    def positions(self, also: int, at_most: int = 20) -> list[int]:
        """Return positions to show, from 1 to the last one: evenly spaced round numbers, and ``also``."""
        last = len(self.summed)
        step = next(s for s in _round_numbers() if last / s <= at_most - 3)
        return sorted({1, last, also, *range(step, last, step)})

    def write(self, path: Path) -> None:
        """Write a csv with a row for each position."""
        columns = {
            "responses": self.tokens.tolist(),
            "mean_divergence": self.mean.tolist(),
            "cumulative_divergence": self.cumulative.tolist(),
            "cumulative_share": self.share.tolist(),
        }
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["position", *columns])
            values: Sequence[Sequence[float]] = list(columns.values())
            rows.writerows([n, *row] for n, row in enumerate(zip(*values, strict=True), 1))


def _round_numbers() -> Sequence[int]:
    return [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
