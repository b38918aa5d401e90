"""Does a long run's memory stay flat? An hour of training on a CPU, its resident memory every ten seconds.

python benchmarks/soak.py                  # an hour, one thread
python benchmarks/soak.py --minutes 10
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from opd_lightning.commands import git_commit

RESULTS = Path(__file__).resolve().parent / "results"
EVERY = 10.0  # seconds between samples
RUN = (
    "trainer.max_steps=200000",
    "scheduler=constant",
    "optimizer.lr=2e-4",
    "evaluation.every_steps=100",
    "evaluation.settings.problems=32",
    "evaluation.teacher=false",
    "callbacks.checkpoint.every_steps=50",
    "trainer.enable_progress_bar=false",
)


def resident(pid: int) -> float | None:
    """Return a process's resident memory in MB, None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), None)


def slope(samples: list[tuple[float, float]]) -> float:
    """Return the least-squares growth of (seconds, MB) in MB an hour."""
    return 3600 * statistics.linear_regression(*zip(*samples, strict=True)).slope


def steps_of(folder: Path) -> int:
    """Return the optimizer steps that the run has taken, by its metrics."""
    with (folder / "metrics.csv").open() as file:
        place = next(file).rstrip("\n").split(",").index("step")
        return max((int(line.rstrip("\n").split(",")[place]) for line in file), default=-1) + 1


def watched(folder: Path, minutes: float, overrides: list[str]) -> list[tuple[float, float]]:
    """Train for some minutes and return (seconds since the start, MB)."""
    limit = f"callbacks.stopping.after_minutes={minutes}"
    command = [
        sys.executable,
        "-m",
        "opd_lightning.train",
        *RUN,
        limit,
        f"hydra.run.dir={folder}",
        *overrides,
    ]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    begun, samples = time.monotonic(), []
    while process.poll() is None:
        time.sleep(EVERY)
        found = resident(process.pid)
        if found:
            samples.append((time.monotonic() - begun, found))
    assert process.returncode == 124, process.returncode  # what the time limit leaves with
    return samples


def report(samples: list[tuple[float, float]], steps: int, minutes: float, overrides: list[str]) -> list[str]:
    """Return the curve, one value a minute or two, and its growth after the first tenth."""
    late = [sample for sample in samples if sample[0] > 0.1 * samples[-1][0]]
    shown = samples[:: max(1, len(samples) // 30)]
    least, most = min(mb for _, mb in late), max(mb for _, mb in late)
    return [
        f"# {samples[-1][0] / 60:.0f} minutes of training, {steps} optimizer steps: {slope(late):+.1f} MB an hour",
        "",
        f"`{' '.join(['python benchmarks/soak.py --minutes', f'{minutes:g}', *overrides])}` at commit {git_commit()}, "
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores shared with other work, one thread, "
        f"torch {torch.__version__}. "
        f"Resident memory of the process every {EVERY:.0f} s, with evaluations and checkpoints. After the first tenth "
        f"it lies between {least:.0f} and {most:.0f} MB; the growth is a least-squares line through those samples.",
        "",
        "| minute | MB | |",
        "|---:|---:|---|",
        *(f"| {t / 60:.0f} | {mb:.0f} | {'#' * round(60 * mb / most)} |" for t, mb in shown),
    ]


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        samples = watched(folder, arguments.minutes, arguments.overrides)
        steps = steps_of(folder)
    lines = report(samples, steps, arguments.minutes, arguments.overrides)
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{date.today()}_soak.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
