"""What the measurements say, and the paper's claims beside them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_lightning.toy.distil import GammaExperiment, Measured
from opd_lightning.toy.walk import TASKS

REACHED = 0.5  # distance of the mean final position from the target that still counts as there


def of_task(variance: Tensor, task: int) -> Tensor:
    """Return the entries of the updates that walked this task."""
    return variance[..., task :: len(TASKS)]


def late(variance: Tensor) -> Tensor:
    """Return the median over the last quarter of the updates (the last dimension); nan where one is not finite."""
    last = variance[..., -max(variance.shape[-1] // 4, 1) :]
    return last.median(-1).values + 0 * last.sum(-1)


def summarise(settings: GammaExperiment, measured: Measured) -> list[dict[str, Any]]:
    """Return a row for each seed and task: late variances by gamma, their ratio and order, where the walks end.

    A variance or position that is not finite is None. ``ratio`` is the last gamma's late median over the
    first one's; ``monotone`` says whether the late median rises with every gamma.
    """
    rows = []
    for s, seed in enumerate(settings.seeds):
        for t, task in enumerate(TASKS):
            variance = of_task(measured.variance[s], t)
            medians = _plain(late(variance))
            first, last = medians[0], medians[-1]
            finite = [m for m in medians if m is not None]
            rows.append(
                {
                    "seed": seed,
                    "task": task.name,
                    "target": task.target,
                    "gammas": list(settings.gammas),
                    "late_median_variance": medians,
                    "largest_variance": _plain(variance.max(-1).values),
                    "largest_at": (variance.argmax(-1) * len(TASKS) + t + 1).tolist(),
                    "ratio": last / first if first and last else None,
                    "monotone": len(finite) == len(medians) and finite == sorted(set(finite)),
                    "final_position": _plain(measured.positions[t, s, ..., -1].mean(-1)),
                    "teacher_final_position": float(measured.teacher_positions[t, s, :, -1].mean()),
                }
            )
    return rows


def _plain(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def claims(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return each claim of the paper (arXiv 2603.25562, the toy experiment) with what was measured."""
    low, high = rows[0]["gammas"][0], rows[0]["gammas"][-1]
    pairs = [
        pair
        for row in rows
        for pair in zip(row["largest_variance"], row["late_median_variance"], strict=True)
    ]
    spikes = _range([_over(largest, median) for largest, median in pairs])
    at = [iteration for row in rows for iteration in row["largest_at"]]
    ratios = [math.inf if row["ratio"] is None else row["ratio"] for row in rows]
    return [
        (
            "early spikes for every gamma",
            f"largest at updates {min(at)} to {max(at)}, {spikes} the late median",
        ),
        (
            "later, a larger gamma has the larger variance",
            f"late medians rise with every gamma in {sum(r['monotone'] for r in rows)} of {len(rows)} cases",
        ),
        (
            "gamma .75 and 1 lie one to several orders of magnitude above small gamma",
            f"gamma {high:g} over gamma {low:g}: {_range(ratios)}" + _three_quarters(rows),
        ),
        ("gamma 0 reaches both targets in all runs", _arrivals(rows, 0)),
        ("gamma 1 drifts to wrong regions", _arrivals(rows, -1)),
    ]


def _three_quarters(rows: Sequence[dict[str, Any]]) -> str:
    """Return the ratio at gamma 0.75 too, where it was measured and is not the last."""
    gammas = rows[0]["gammas"]
    if 0.75 not in gammas[1:-1]:
        return ""
    at = gammas.index(0.75)
    found = [_over(r["late_median_variance"][at], r["late_median_variance"][0]) for r in rows]
    return f"; gamma 0.75: {_range(found)}"


def _arrivals(rows: Sequence[dict[str, Any]], at: int) -> str:
    ends = [row["final_position"][at] for row in rows]
    near = [e is not None and abs(e - r["target"]) <= REACHED for e, r in zip(ends, rows, strict=True)]
    off = max((math.inf if e is None else abs(e - r["target"])) for e, r in zip(ends, rows, strict=True))
    return (
        f"gamma {rows[0]['gammas'][at]:g} ends at its target in {sum(near)} of {len(rows)} cases, "
        f"mean position at most {off:.2f} away"
    )


def _over(above: float | None, below: float | None) -> float:
    return above / below if above is not None and below else math.inf


def _range(values: Sequence[float]) -> str:
    low, high = (_short(v) for v in (min(values), max(values)))
    return f"{low}x" if low == high else f"{low} to {high}x"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0e}"


def write_variance(settings: GammaExperiment, measured: Measured, path: Path) -> None:
    """Write a row for each update: iteration, task, seed, and a column for each gamma."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "task", "seed", *(f"gamma_{gamma:g}" for gamma in settings.gammas)])
        for k in range(settings.iterations):
            for seed, values in zip(settings.seeds, measured.variance[..., k].tolist(), strict=True):
                name = TASKS[k % len(TASKS)].name
                writer.writerow([k + 1, name, seed, *(f"{value:.5g}" for value in values)])
