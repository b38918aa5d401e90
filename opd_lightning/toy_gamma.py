"""``python -m opd_lightning.toy_gamma``: Revisiting OPD's toy experiment, gradient variance against gamma."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from opd_lightning.commands import command, git_commit, plain, quiet, refuse_unknown_keys
from opd_lightning.errors import require
from opd_lightning.toy.distil import GammaExperiment, Measured, measure
from opd_lightning.toy.picture import require_matplotlib, variance_figure, visits_figure
from opd_lightning.toy.summary import claims, summarise, write_variance

SETTINGS = {field.name for field in fields(GammaExperiment)}
KEYS = SETTINGS | {"pictures"}


def settings_of(config: DictConfig) -> GammaExperiment:
    """Return the experiment's settings.

    Raises:
        ConfigError: an unknown key, a value out of its range, or pictures without matplotlib.
    """
    refuse_unknown_keys(config, KEYS)
    settings = GammaExperiment(**{name: value for name, value in plain(config).items() if name in SETTINGS})
    wanted = config.pictures
    require(isinstance(wanted, bool), "pictures", "be true or false", wanted, "use false to draw none")
    if wanted:
        require_matplotlib("pictures")
    return settings


def progress(settings: GammaExperiment) -> Callable[[int, Tensor], None]:
    """Return a report of ten lines over the run: the variances of the first seed."""
    every = max(settings.iterations // 10, 1)

    def report(iteration: int, variances: Tensor) -> None:
        if iteration % every == 0:
            shown = ", ".join(f"{v:.2g}" for v in variances[0].tolist())
            print(f"iteration {iteration}/{settings.iterations}: variance by gamma {shown}", flush=True)

    return report


def variances_table(rows: list[dict[str, Any]]) -> Table:
    """Return late variances, their ratio and final positions, a row for each seed and task."""
    gammas = rows[0]["gammas"]
    shown = Table(title="median gradient variance of the last quarter, by gamma")
    names = ["seed", "task", *(f"{g:g}" for g in gammas), "ratio", "rises"]
    for name in [*names, f"ends at (target), γ={gammas[0]:g}", f"γ={gammas[-1]:g}"]:
        shown.add_column(name, justify="right")
    for row in rows:
        ends = [_cell(end, ".2f") for end in row["final_position"]]
        shown.add_row(
            str(row["seed"]),
            row["task"],
            *(_cell(value, ".3g") for value in row["late_median_variance"]),
            _cell(row["ratio"], ".3g"),
            "yes" if row["monotone"] else "no",
            f"{ends[0]} ({row['target']:g})",
            ends[-1],
        )
    return shown


def _cell(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def claims_table(rows: list[dict[str, Any]]) -> Table:
    """Return the paper's claims beside what was measured."""
    shown = Table("the paper (arXiv 2603.25562)", "measured", title="claims")
    for claim, found in claims(rows):
        shown.add_row(claim, found)
    return shown


def save(settings: GammaExperiment, measured: Measured, pictures: bool, folder: Path) -> None:
    """Write the variance of every update, and both pictures if wanted."""
    write_variance(settings, measured, folder / "variance.csv")
    if pictures:
        variance_figure(settings, measured).savefig(folder / "variance.png", dpi=100)
        visits_figure(settings, measured).savefig(folder / "visits.png", dpi=100)


@command("toy_gamma")
def main(config: DictConfig) -> None:
    """Command line entry."""
    quiet()
    folder = Path(HydraConfig.get().runtime.output_dir)
    settings = settings_of(config)
    begun = time.perf_counter()
    measured = measure(settings, progress(settings))
    rows = summarise(settings, measured)
    seconds = round(time.perf_counter() - begun, 2)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"settings": plain(config), "results": rows, "seconds": seconds, "git_commit": git_commit()}
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    save(settings, measured, config.pictures, folder)
    # A pipe has no width; rich would take 80 columns and break numbers.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(variances_table(rows))
    console.print(claims_table(rows))
    print(f"{seconds} s; written to {folder}", flush=True)


if __name__ == "__main__":
    main()
