"""Metrics of graded responses: accuracy, pass@k, length, truncation, over ranks and by difficulty."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.types import Graded


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the chance that at least one of ``k`` of the ``samples`` drawn responses is right.

    ``1 - C(n - c, k) / C(n, k)``, unbiased (Chen et al. 2021, section 2.1).
    """
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


class ResponseMetrics(Metric):
    """Accumulates graded responses.

    ``compute`` returns ``accuracy`` (the mean over responses, avg@k with k samples a problem), ``length``
    in tokens, ``truncation`` (share cut by the budget), ``repetition`` (share of repeated 8-grams), ``repetitive``
    (share of texts that end in a loop, StableOPD's RepRate), and for k > 1 samples ``pass@k``; problems without
    an answer count for all but accuracy and ``pass@k``.
    """

    full_state_update = False

    correct: list[Tensor]
    lengths: list[Tensor]
    truncated: list[Tensor]
    repetition: list[Tensor]
    repetitive: list[Tensor]
    group: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("correct", "lengths", "truncated", "repetition", "repetitive", "group"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, graded: Graded) -> None:
        """Add a batch of responses."""
        self.correct.append(graded.correct.to(self.device))
        self.lengths.append(graded.lengths.float().to(self.device))
        self.truncated.append(graded.truncated.float().to(self.device))
        self.repetition.append(graded.repetition.to(self.device))
        self.repetitive.append(graded.repetitive.float().to(self.device))
        self.group.append(graded.group.to(self.device))

    @property
    def count(self) -> int:
        """Responses added on this process."""
        return sum(map(len, self.lengths))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over everything added, on all ranks."""
        correct, group = _joined(self.correct), _joined(self.group)
        means = {
            "length": self.lengths,
            "truncation": self.truncated,
            "repetition": self.repetition,
            "repetitive": self.repetitive,
        }
        values = {name: _joined(parts).mean() for name, parts in means.items()}
        known = correct.isfinite()
        if known.any():
            values = {"accuracy": correct[known].mean()} | values
            values |= _pass_rates(correct[known], group[known])
        return values


def _joined(parts: Tensor | Sequence[Tensor]) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(list(parts))


def _pass_rates(correct: Tensor, group: Tensor) -> dict[str, Tensor]:
    """Return pass@k for k = 2, 4, 8, ... below the samples that every problem has, and for their number."""
    _, member, samples = torch.unique(group, return_inverse=True, return_counts=True)
    right = torch.zeros(len(samples), device=correct.device).index_add_(0, member, (correct > 0.5).float())
    least, rates = int(samples.min()), {}
    for k in sorted({2**i for i in range(1, least.bit_length())} | ({least} - {1})):
        each = [pass_at_k(int(n), int(c), k) for n, c in zip(samples, right, strict=True)]
        rates[f"pass@{k}"] = torch.tensor(each, device=correct.device).mean()
    return rates


class GroupedResponseMetrics:
    """:class:`ResponseMetrics` over all responses and for each difficulty."""

    def __init__(self) -> None:
        self._metrics = {"all": ResponseMetrics()}

    def update(self, graded: Graded) -> None:
        """Add a batch of responses."""
        self._metrics["all"].update(graded)
        for label in {d for d in graded.difficulty if d is not None}:
            rows = [i for i, d in enumerate(graded.difficulty) if d == label]
            self._metrics.setdefault(label, ResponseMetrics()).update(graded.rows(rows))

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return the metrics by group, all problems first, with the number of ``responses``."""
        ordered = ["all", *sorted(name for name in self._metrics if name != "all")]
        return {
            name: {"responses": torch.tensor(float(self._metrics[name].count))}
            | self._metrics[name].compute()
            for name in ordered
        }
