"""Is a run that was killed and resumed the run that was not killed? kill -9 at many moments, compared bit by bit.

python benchmarks/crashes.py                   # 20 kills, seed 0; about 12 minutes on two cores
python benchmarks/crashes.py --kills 4 --seed 7
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from crash_hook import PHASES, killed_in
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.commands import git_commit

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
STEPS, SAVED = 48, 8
RUN = (
    f"trainer.max_steps={STEPS}",
    f"callbacks.checkpoint.every_steps={SAVED}",
    "evaluation.every_steps=16",
    "evaluation.settings.problems=32",
    "evaluation.teacher=false",
    "collector.prompts_per_collection=48",
    "collector.steps_per_collection=3",  # a checkpoint may fall within a collection
    "trainer.accumulate_grad_batches=2",
    "rollout.max_new_tokens=96",
    "teacher=ema",  # an average that only the run's past could give
    "trainer.enable_progress_bar=false",
    "reporting.peak_tflops=1",
)


@dataclass(frozen=True)
class Kill:
    """Where a run is killed: in the ``count``-th phase of its kind, ``part`` of the way through."""

    phase: str
    count: int
    part: float

    @property
    def overrides(self) -> list[str]:
        """The callback that does it."""
        values = {
            "_target_": "crash_hook.KillAt",
            "phase": self.phase,
            "count": self.count,
            "part": self.part,
        }
        return [f"+callbacks.kill.{name}={value}" for name, value in values.items()]


def drawn(number: int, seed: int) -> list[Kill]:
    """Return ``number`` moments, as many in each phase."""
    generator = random.Random(seed)
    most = {"generate": STEPS // 3, "score": STEPS // 3, "backward": 2 * STEPS, "checkpoint": STEPS // SAVED}
    kills = []
    for i in range(number):
        phase = PHASES[i % len(PHASES)]
        kills.append(Kill(phase, generator.randint(1, most[phase]), round(generator.random() * 0.9, 2)))
    return kills


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command with one thread."""
    command = [sys.executable, "-m", "opd_lightning.train", *RUN, f"hydra.run.dir={folder}", *overrides]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def left(folder: Path) -> dict[str, Any]:
    """Return what a finished run left, seconds and speeds left out."""
    with (folder / "metrics.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if v and not k.startswith("time/")} for row in csv.DictReader(file)
        ]
    events = EventAccumulator(str(folder)).Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(("time/", "hp_metric"))
    }
    saved = torch.load(folder / "checkpoints" / f"step={STEPS}.ckpt", weights_only=True)
    return {
        "student": load_file(folder / "student" / "model.safetensors"),
        "metrics.csv": rows,
        "TensorBoard": curves,
        "optimizer": saved["optimizer_states"],
        "scheduler": saved["lr_schedulers"],
        "teacher's average": saved["teacher"],
        "random numbers": saved["OnPolicyData"]["processes"],
        "tokens": saved["OnPolicyData"]["clock"]["charged"][1],
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def crash(kill: Kill, whole: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Kill a run, resume it by the same command, and compare its end with that of the whole one."""
    begun = time.perf_counter()
    dead = train(folder, *kill.overrides)
    lived = time.perf_counter() - begun
    done = {"phase": kill.phase, "count": kill.count, "part": kill.part, "seconds": round(lived, 1)}
    done |= {"killed": dead.returncode == -9, "half": killed_in(folder)}
    resumed = train(folder, "resume=auto")
    lines = [line for line in resumed.stdout.splitlines() if line.startswith("resumed")]
    done["from"] = lines[0].rsplit(" ", 1)[-1] if lines else "?"
    if resumed.returncode:
        return done | {"differs": resumed.stderr[-2000:]}
    ended = left(folder)
    return done | {"differs": ", ".join(name for name in whole if not same(whole[name], ended[name]))}


def table(results: list[dict[str, Any]]) -> list[str]:
    """Return the kills as markdown."""
    rows = [
        f"| {r['phase']} | {r['count']} | {r['part']:.2f} | {r['seconds']} | {r['from']} | {r['half'] or '-'} | "
        f"{'not killed' if not r['killed'] else r['differs'] or 'bit-equal'} |"
        for r in results
    ]
    return [
        "| killed in | time | part of it | after s | went on from | left half done | end beside the whole run |",
        "|---|---:|---:|---:|---|---|---|",
        *rows,
    ]


def main() -> None:
    """Kill, resume, compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        begun = time.perf_counter()
        first = train(root / "whole")
        assert first.returncode == 0, first.stderr
        seconds = time.perf_counter() - begun
        whole = left(root / "whole")
        kills = drawn(arguments.kills, arguments.seed)
        with ThreadPoolExecutor(arguments.at_once) as pool:
            folders = [root / str(i) for i in range(len(kills))]
            results = list(pool.map(crash, kills, [whole] * len(kills), folders))
    good = sum(r["killed"] and not r["differs"] for r in results)
    lines = [
        f"# {arguments.kills} kills, {good} resumed runs bit-equal to the whole one",
        "",
        f"`python benchmarks/crashes.py --kills {arguments.kills} --seed {arguments.seed}` at commit {git_commit()}, "
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread a run, torch {torch.__version__}. "
        f"The whole run took {seconds:.0f} s: {STEPS} optimizer steps, a checkpoint every {SAVED}, collections of 3 "
        "steps, two micro-batches a step, an ema teacher. Compared: the student's file, metrics.csv, TensorBoard's "
        "curves, and in the last checkpoint the optimizer, the schedule, the teacher's average, the random number "
        "generators and the tokens counted; seconds and speeds are left out. Each process kills itself with SIGKILL.",
        "",
        *table(results),
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{date.today()}_crashes.md").write_text("\n".join(lines) + "\n")
    sys.exit(good != len(results))


if __name__ == "__main__":
    main()
