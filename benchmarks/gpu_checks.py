"""Does every strategy learn on a GPU what one process learns on a CPU? Losses of the same short run, side by side.

python benchmarks/gpu_checks.py               # a machine with a GPU; DeepSpeed where it is installed
python benchmarks/gpu_checks.py --device cpu  # the script itself: ddp and fsdp, two processes each, gloo

Writes benchmarks/results/<date>_gpu_checks_<device>.md, and ends with 1 if a case fails or its losses differ.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from opd_lightning.commands import git_commit

RESULTS = Path(__file__).resolve().parent / "results"
# The evaluation before training, two collections of two steps of two micro-batches, checkpoint, export.
RUN = (
    "trainer.max_steps=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.enable_progress_bar=false",
    "collector.prompts_per_collection=8",
    "collector.steps_per_collection=2",
    "rollout.max_new_tokens=40",
    "scheduler.warmup_steps=0",
    "evaluation.every_steps=null",
    "evaluation.settings.problems=4",
    "evaluation.teacher=false",
)
FULL, HALF = "trainer.precision=32-true", "trainer.precision=bf16-mixed"
EXACT, ROUNDED = (
    1e-3,
    0.1,
)  # relative, of each step's loss; bfloat16 may draw other tokens after the first step
NOT_RECORDED = "no CUDA graph of a decoding step"
"""What the engine warns of where it goes on without."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Overrides of a run, and how far its losses may be from the CPU's: over all steps, or at the first alone."""

    overrides: tuple[str, ...]
    tolerance: float = EXACT
    first: bool = False
    needs: str | None = None


ON_CPU = {
    "ddp, 2 processes": Case(overrides=("trainer=cpu", "strategy=ddp", "trainer.devices=2")),
    "fsdp, 2 processes": Case(overrides=("trainer=cpu", "strategy=fsdp", "trainer.devices=2")),
    "steps in fixed memory": Case(overrides=("trainer=cpu", "engine.graphs=true")),
}


def on_gpu() -> dict[str, Case]:
    """Return the cases of one GPU."""
    gpu = ("trainer=gpu", "trainer.devices=1")
    zero = {
        f"deepspeed_{n}": Case(overrides=(*gpu, FULL, f"strategy=deepspeed_{n}"), needs="deepspeed")
        for n in (2, 3)
    }
    whole = {
        name: Case(overrides=(*gpu, FULL, f"strategy={name}")) for name in ("auto", "ddp", "fsdp", "fsdp1")
    }
    half = {
        f"{name}, bf16-mixed": Case(
            overrides=(*gpu, HALF, f"strategy={name}"),
            tolerance=ROUNDED,
            first=True,
            needs="deepspeed" if "deepspeed" in name else None,
        )
        for name in ("auto", "fsdp", "fsdp1", "deepspeed_3")
    }
    more = {
        "teacher offloaded": Case(overrides=(*gpu, FULL, "teacher.offload=cpu")),
        "gradient checkpointing": Case(overrides=(*gpu, FULL, "student.gradient_checkpointing=true")),
    }
    graphs = {
        "CUDA graphs": Case(overrides=(*gpu, FULL, "engine.graphs=true")),
        "CUDA graphs, fsdp": Case(overrides=(*gpu, FULL, "engine.graphs=true", "strategy=fsdp")),
        "CUDA graphs, bf16-mixed": Case(
            overrides=(*gpu, HALF, "engine.graphs=true"), tolerance=ROUNDED, first=True
        ),
    }
    return whole | zero | half | more | graphs


def run(overrides: tuple[str, ...], folder: Path) -> list[float] | str:
    """Return the losses of a run by step, or the last line of what went wrong."""
    command = [sys.executable, "-m", "opd_lightning.train", *RUN, *overrides, f"hydra.run.dir={folder}"]
    mine = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    try:
        done = subprocess.run(command, env=mine, capture_output=True, text=True, timeout=1200)
    except subprocess.TimeoutExpired:
        return "no end within 20 minutes"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return f"exit code {done.returncode}: {lines[-1] if lines else 'nothing was said'}"
    if NOT_RECORDED in done.stderr:
        return next(line for line in done.stderr.splitlines() if NOT_RECORDED in line).strip()
    if not (folder / "student" / "model.safetensors").is_file():
        return "no student was written"
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return [float(row["train/loss"]) for row in rows]


def judged(case: Case, expected: list[float], found: list[float] | str) -> tuple[bool, str]:
    """Return whether a case holds, and its cells of the table."""
    if isinstance(found, str):
        return False, f"| {found.replace('|', '/')[:160]} | | |"
    if len(found) != len(expected) or not all(map(math.isfinite, found)):
        return False, f"| {len(found)} losses for {len(expected)}, or not finite | | |"
    apart = [abs(a - b) / max(abs(a), 1e-6) for a, b in zip(expected, found, strict=True)]
    worst = apart[0] if case.first else max(apart)
    return worst <= case.tolerance, f"| {found[0]:.6f} | {apart[0]:.1e} | {max(apart):.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_checks needs a GPU, and torch sees none here; --device cpu tries the script itself")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    lines = [
        f"# The same run by every strategy, {date.today()}",
        "",
        f"{name}, torch {torch.__version__}, commit {git_commit()}. The run: `{' '.join(RUN)}`.",
        f"A case holds where each step's loss is within {EXACT:g} of the CPU's, relative; bf16-mixed: the first "
        f"step's within {ROUNDED:g}.",
        "",
        "| case | first loss | apart at first | apart at most | holds |",
        "|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        expected = run(("trainer=cpu",), Path(folder) / "reference")
        if isinstance(expected, str):
            sys.exit(f"the reference on the CPU failed: {expected}")
        for number, (what, case) in enumerate((ON_CPU if device == "cpu" else on_gpu()).items()):
            if case.needs and importlib.util.find_spec(case.needs) is None:
                lines.append(f"| {what} | {case.needs} is not installed | | | left out |")
            else:
                holds, cells = judged(case, expected, run(case.overrides, Path(folder) / str(number)))
                good = good and holds
                lines.append(f"| {what} {cells} {'yes' if holds else 'NO'} |")
            print(lines[-1], flush=True)
    (RESULTS / f"{date.today()}_gpu_checks_{device}.md").write_text("\n".join(lines) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
