"""The two pictures of the experiment: variance against iteration, and where the finished students walk."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.toy.distil import GammaExperiment, Measured
from opd_lightning.toy.summary import of_task
from opd_lightning.toy.walk import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REACH, BINS = 8.0, 64  # the maps show positions in [-8, 8]
WINDOW = 25  # updates of a task in a running median


def require_matplotlib(field: str) -> None:
    """Refuse to draw where there is no matplotlib.

    Raises:
        ConfigError: it is not installed.
    """
    there = importlib.util.find_spec("matplotlib") is not None
    remedy = 'install it with pip install "opd-lightning[notebooks]"'
    require(there, field, "be drawn by matplotlib", "no matplotlib in this environment", remedy)


def variance_figure(settings: GammaExperiment, measured: Measured) -> Figure:
    """Return log variance against iteration, a panel for each seed and task and a line for each gamma.

    Faint: every update. Strong: a running median.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    size = (9.0, 0.6 + 2.2 * len(settings.seeds))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(settings.seeds), len(TASKS), squeeze=False, sharex=True, sharey="row")
    for (s, t), panel in np.ndenumerate(panels):
        curves = of_task(measured.variance[s], t)
        iterations = np.arange(curves.shape[-1]) * len(TASKS) + t + 1
        for g, (curve, gamma) in enumerate(zip(curves, settings.gammas, strict=True)):
            colour = colormaps["viridis"](0.9 * g / (len(settings.gammas) - 1))
            panel.semilogy(iterations, curve.numpy(), color=colour, alpha=0.15, linewidth=0.5)
            panel.semilogy(
                iterations, running_median(curve).numpy(), color=colour, linewidth=1.2, label=f"γ = {gamma:g}"
            )
        panel.set_title(f"{TASKS[t].name} task, seed {settings.seeds[s]}", fontsize=9)
        panel.tick_params(labelsize=8)
    for panel in panels[:, 0]:
        panel.set_ylabel("gradient variance", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("iteration", fontsize=8)
    panels[0, -1].legend(fontsize=7, loc="upper right")
    return figure


def running_median(curve: Tensor) -> Tensor:
    """Return the median of WINDOW entries around each, fewer if there are few; the curve is mirrored at its ends."""
    half = min(WINDOW, len(curve) - 1) // 2
    before, after = curve[1 : half + 1].flip(0), curve[len(curve) - 1 - half : -1].flip(0)
    return torch.cat((before, curve, after)).unfold(0, 2 * half + 1, 1).median(-1).values


def shown_gammas(gammas: Sequence[float]) -> list[int]:
    """Return the rows of gamma 0, 0.5 and 1, or of the first, the middle and the last where one is missing."""
    wanted = [0.0, 0.5, 1.0]
    if all(gamma in gammas for gamma in wanted):
        return [list(gammas).index(gamma) for gamma in wanted]
    return sorted({0, len(gammas) // 2, len(gammas) - 1})


def visitation(positions: Tensor) -> Tensor:
    """Return the share of walks in each bin of [-8, 8] at each time, (bins, horizon + 1).

    Args:
        positions: (walks, horizon + 1).
    """
    columns = [torch.histc(at.nan_to_num(2 * REACH), BINS, -REACH, REACH) for at in positions.unbind(-1)]
    return torch.stack(columns, -1) / len(positions)


def visits_figure(settings: GammaExperiment, measured: Measured) -> Figure:
    """Return state-visitation maps, a row for each seed and a column for each task and shown gamma.

    Positions -8 to 8 against time, the colour by the square root of the share of walks; dashed: the target.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    shown = shown_gammas(settings.gammas)
    columns = [(t, g) for t in range(len(TASKS)) for g in shown]
    size = (0.8 + 1.6 * len(columns), 0.5 + 1.9 * len(settings.seeds))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(settings.seeds), len(columns), squeeze=False, sharex=True, sharey=True)
    for (s, column), panel in np.ndenumerate(panels):
        t, g = columns[column]
        positions = measured.positions[t, s, g]
        end, extent = positions[:, -1].mean(), (-0.5, settings.horizon + 0.5, -REACH, REACH)
        panel.imshow(
            visitation(positions).numpy(),
            norm=PowerNorm(0.5, 0, 1),
            extent=extent,
            aspect="auto",
            origin="lower",
            cmap="magma",
        )
        panel.axhline(TASKS[t].target, color="white", linewidth=0.6, linestyle="--")
        title = f"{TASKS[t].name}, γ = {settings.gammas[g]:g}\nends at {end:.1f}"
        panel.set_title(title, fontsize=8)
        panel.tick_params(labelsize=7)
    for seed, panel in zip(settings.seeds, panels[:, 0], strict=True):
        panel.set_ylabel(f"seed {seed}: position", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("time", fontsize=8)
    return figure
