"""Many training runs, each in a process of its own, and what the other scripts read of them."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Job:
    """A run: the name of its row, its seed, and its overrides."""

    name: str
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What a run left: its summary, the CPU seconds of its process, and each metric as (step, value)."""

    name: str
    seed: int
    summary: dict
    cpu_seconds: float
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def last(self, metric: str, part: float = 0.1) -> float:
        """Return the mean of a metric over the last ``part`` of the run's steps; nan without one."""
        curve = self.curves.get(metric, [])
        if not curve:
            return float("nan")
        first = (1 - part) * max(step for step, _ in curve)
        return statistics.fmean(value for step, value in curve if step >= first)

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the whole run; nan without one."""
        curve = self.curves.get(metric, [])
        return statistics.fmean(value for _, value in curve) if curve else float("nan")


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return each column of a metrics.csv as (step, value) where it has one."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    return curves


def run(job: Job) -> Result:
    """Train once on one thread; a failed run raises with the end of what it said."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [f"seed={job.seed}", f"hydra.run.dir={folder}", *job.overrides]
        arguments += ["trainer.enable_progress_bar=false", "evaluation.teacher=false"]
        arguments += ["logger=[csv]", "callbacks=[]"]
        process = subprocess.Popen(
            [sys.executable, "-m", "opd_lightning.train", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{job} failed:\n{said[-3000:]}")
        summary = json.loads((Path(folder) / "summary.json").read_text())
        curves = read_curves(Path(folder) / "metrics.csv")
    return Result(job.name, job.seed, summary, usage.ru_utime + usage.ru_stime, curves)


def run_all(jobs: Iterable[Job], store: Path, processes: int) -> list[Result]:
    """Run what ``store`` does not hold yet, ``processes`` at a time, adding each result as it comes."""
    jobs = list(jobs)
    done = {(r.name, r.seed): r for r in read(store)}
    left = [job for job in jobs if (job.name, job.seed) not in done]
    store.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(processes) as pool, store.open("a") as file:
        for result in pool.map(run, left):
            done[result.name, result.seed] = result
            file.write(json.dumps(vars(result)) + "\n")
            file.flush()
            after = result.summary["accuracy_after"]
            print(
                f"{result.name} seed {result.seed}: {after:.1%}, {result.cpu_seconds:.0f} CPU s", flush=True
            )
    return [done[job.name, job.seed] for job in jobs]


def read(store: Path) -> list[Result]:
    """Return the results that a file holds."""
    if not store.exists():
        return []
    results = [Result(**json.loads(line)) for line in store.read_text().splitlines()]
    return [
        Result(
            r.name, r.seed, r.summary, r.cpu_seconds, {k: [tuple(p) for p in v] for k, v in r.curves.items()}
        )
        for r in results
    ]


def by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each name, in order."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    return groups


def mean_of(values: Sequence[float]) -> float:
    """Return the mean of the finite values; nan without one."""
    finite = [value for value in values if value == value]
    return statistics.fmean(finite) if finite else float("nan")


def about(command: str, results: Iterable[Result]) -> str:
    """Return the command, the commits that the results were run at, and the machine in one sentence."""
    commits = sorted({str(result.summary["git_commit"]) for result in results})
    return _about(command, f"runs at commit {' and '.join(commits)}", "one thread a run")


def about_here(command: str, how: str) -> str:
    """Return the command, the commit of the checkout, ``how`` it was run and the machine in one sentence."""
    from opd_lightning.commands import git_commit

    return _about(command, f"at commit {git_commit()}", how)


def _about(command: str, commits: str, how: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"`{command}`, {commits}, {date.today()}, on {name}, {os.cpu_count()} cores, "
        f"{how}, Python {platform.python_version()}; load averages at the end {load}."
    )
