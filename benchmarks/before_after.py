"""Did a change make the default run faster? Two commits in turn, seconds by phase.

    python benchmarks/before_after.py 6d14531 HEAD
    python benchmarks/before_after.py 6d14531 HEAD --repeats 3 -- trainer.max_steps=80

Each commit is checked out into a folder of its own and trains with this environment's packages; what
follows ``--`` goes to both. The medians over the repeats count. Writes a dated table into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from trials import RESULTS, about_here

ROOT = Path(__file__).resolve().parents[1]


def checkout(commit: str, folder: Path) -> str:
    """Put a commit's files into ``folder`` and return its short name."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    name = ["git", "rev-parse", "--short", commit]
    return subprocess.run(name, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def train(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the summary of one run of the checkout in ``folder``, with its CPU seconds."""
    with tempfile.TemporaryDirectory() as run:
        quiet = ["trainer.enable_progress_bar=false", f"hydra.run.dir={run}", "evaluation.teacher=false"]
        process = subprocess.Popen(
            [sys.executable, "-m", "opd_lightning.train", *quiet, *overrides],
            env=os.environ | {"PYTHONPATH": str(folder)},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"the run in {folder.name} failed with {process.returncode}")
        summary: dict[str, Any] = json.loads((Path(run) / "summary.json").read_text())
    return summary | {"cpu_seconds": usage.ru_utime + usage.ru_stime}


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a line a quantity, the later commit's ratio last."""

    def of(name: str, read: Any) -> float:
        return statistics.median(read(summary) for summary in found[name])

    before, after = found
    rows = {
        "CPU seconds": lambda s: s["cpu_seconds"],
        "seconds": lambda s: s["seconds"],
        "accuracy after, %": lambda s: 100 * s["accuracy_after"],
    }
    for phase in found[before][0]["seconds_by_phase"]:
        rows[f"seconds, {phase}"] = lambda s, phase=phase: s["seconds_by_phase"].get(phase, 0.0)
    lines = [f"| | {before} | {after} | before / after |", "|---|---|---|---|"]
    for name, read in rows.items():
        old, new = of(before, read), of(after, read)
        lines.append(f"| {name} | {old:.1f} | {new:.1f} | {old / new if new else float('nan'):.2f} |")
    return lines


def main() -> None:
    """Run both in turn, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", nargs=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, overrides = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for i, commit in enumerate(args.commits):
            folder = Path(scratch) / f"checkout{i}"
            folders[checkout(commit, folder)] = folder
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
        for repeat in range(args.repeats):
            for name in list(folders)[:: -1 if repeat % 2 else 1]:
                found[name].append(train(folders[name], overrides))
                print(f"{name}: {found[name][-1]['cpu_seconds']:.0f} CPU s", flush=True)
    command = " ".join(["python benchmarks/before_after.py", *sys.argv[1:]])
    threads = f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s), {args.repeats} runs each, medians"
    lines = [f"# Default run before and after, {date.today()}", "", about_here(command, threads), ""]
    text = "\n".join([*lines, *table(found)]) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{date.today()}_before_after.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
