"""Does the default run do what the README says? Three seeds, a table and a dated result.

python benchmarks/default_run.py            # seeds 0 1 2, about 75 s each on two cores
python benchmarks/default_run.py 3 4 -- estimator=token support=none optimizer.lr=5e-4
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from opd_lightning.commands import git_commit

RESULTS = Path(__file__).resolve().parent / "results"


def cpu() -> str:
    """Return the processor's name and the number of cores in use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def run(seed: int, overrides: list[str], threads: int) -> dict:
    """Run the train command once in a process of its own and return its summary."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"seed={seed}",
            "trainer.enable_progress_bar=false",
            f"hydra.run.dir={folder}",
            *overrides,
        ]
        subprocess.run(
            [sys.executable, "-m", "opd_lightning.train", *arguments],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        return json.loads((Path(folder) / "summary.json").read_text())


def row(seed: int, s: dict) -> str:
    """Return a summary as a row of the table."""
    speed = s["tokens_per_second"]
    return (
        f"| {seed} | {s['accuracy_before']:.1%} | **{s['accuracy_after']:.1%}** | {s['accuracy_before_sampled']:.1%} "
        f"| {s['accuracy_after_sampled']:.1%} | {s['teacher_accuracy']:.1%} | {s['seconds']:.0f} "
        f"| {speed['generate']:.0f} / {speed['score']:.0f} / {speed['train']:.0f} | {s['peak_memory_mb']:.0f} |"
    )


def main() -> None:
    """Run the seeds, print the table and write it down."""
    own = sys.argv[1:]
    split = own.index("--") if "--" in own else len(own)
    seeds, overrides = [int(seed) for seed in own[:split]] or [0, 1, 2], own[split + 1 :]
    threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    header = [
        "| seed | greedy before | greedy after | sampled before | sampled after | teacher | seconds "
        "| tokens/s: generate / score / train | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [row(seed, run(seed, overrides, threads)) for seed in seeds]
    command = " ".join(["python benchmarks/default_run.py", *own])
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    about = [
        f"# Default run, {date.today()}",
        "",
        f"`OMP_NUM_THREADS={threads} {command}` at commit {git_commit()}, on {cpu()}, "
        f"Python {platform.python_version()}; load averages at the end {load}. "
        "256 held-out problems; one greedy and one sampled response each.",
        "",
    ]
    text = "\n".join([*about, *header, *rows]) + "\n"
    name = (
        "default_run" if not overrides else "default_run_" + "_".join(o.replace("=", "-") for o in overrides)
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{date.today()}_{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
