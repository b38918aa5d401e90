"""Does torch.compile pay? A student's learning and a teacher's scoring with and without, and what compiling takes.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py            # two to four minutes on a CPU
    python benchmarks/compiled.py --device cuda --dtype bfloat16

Rows: 32 responses of the built-in student to its own task, in buckets, as in a run. The compiled model is also
run as it is written, in turns, so that other work on the machine hits both alike; the best of the repeats
counts, CPU seconds of the process on a CPU. Writes a dated table into results.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from datetime import date

import torch
from default_run import RESULTS, cpu
from layouts import by_length, learning, medium, real_rows, scoring, timed

from opd_lightning.commands import git_commit
from opd_lightning.layers import compile_layers, eager
from opd_lightning.models import load_model
from opd_lightning.scorer import Scorer


def uncompiled(scorer: Scorer, run: Callable[[], None]) -> Callable[[], None]:
    """Return ``run`` with the layers as they are written."""

    def plain() -> None:
        with eager(scorer.model):
            run()

    return plain


def row(name: str, scorer: Scorer, run: Callable[[], None], repeats: int, device: str) -> str:
    """Compile, measure both, and return the row."""
    begun = time.perf_counter()
    compile_layers(scorer.model)
    run()
    first = time.perf_counter() - begun
    seconds = timed({"eager": uncompiled(scorer, run), "compiled": run}, repeats, device)
    plain, faster = seconds["eager"], seconds["compiled"]
    saved = plain - faster
    pays = f"{first / saved:.0f}" if saved > 0 else "never"
    return f"| {name} | {1000 * plain:.1f} | {1000 * faster:.1f} | **{plain / faster:.2f}** | {first:.0f} | {pays} |"


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    rows = real_rows(32).to(asked.device)
    micro_batches = [rows.rows(slice(i, i + 16)) for i in range(0, 32, 16)]
    lines = [
        f"# torch.compile of the decoder layers, {date.today()}",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/compiled.py --device {asked.device} --dtype "
        f"{asked.dtype}` at commit {git_commit()}, on {cpu()}, torch {torch.__version__}; load averages at the start "
        f"{', '.join(f'{v:.1f}' for v in os.getloadavg())}. One pass is over 32 responses; the last column is the "
        "passes after which what the first one took is won back.",
        "",
        "| pass | eager, ms | compiled, ms | gain | first pass, s | pays after |",
        "|---|---|---|---|---|---|",
    ]
    models = {
        "built-in student, learning": (load_model("builtin:word_problems/student", "student.path"), learning),
        "built-in teacher, scoring": (load_model("builtin:word_problems/teacher", "teacher.path"), scoring),
        "1.5 M weights, learning": (medium(), learning),
    }
    print("\n".join(lines), flush=True)
    for name, (model, half) in models.items():
        scorer = Scorer(model.to(asked.device, getattr(torch, asked.dtype)))  # type: ignore[call-overload]
        run = half(scorer, micro_batches if half is learning else by_length(rows, 32))
        lines.append(row(name, scorer, run, asked.repeats, asked.device))
        print(lines[-1], flush=True)
    (RESULTS / f"{date.today()}_compiled.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
