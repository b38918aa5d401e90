"""How far is a plan's memory from what a run takes? Runs of random models of several sizes, beside their estimates.

    OMP_NUM_THREADS=1 python benchmarks/plan_memory.py       # fifteen minutes on one core, Linux

Each run trains three optimizer steps in a process of its own, put together as a Python user does, three times.
Compared is what training adds to the loaded models: the peak of the resident memory over that with both models
loaded and one forward of each done, against the estimate's parts without libraries and weights. A step of a tiny
run comes before, for what libraries load at their first use, which belongs to them. Writes a dated table into
results.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from default_run import RESULTS, cpu
from own import assembled, train
from steps import ADAM, EOS, PAD, RATE, Job, endless_model, tokenizer
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.commands import git_commit
from opd_lightning.planning.memory import Memory, memory
from opd_lightning.planning.settings import Assumptions, planned_run


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: the student's family, width, layers and vocabulary, the kind of loss, and the batch."""

    family: str
    width: int
    layers: int
    vocab: int
    kind: str = "default"
    batch: int = 8
    response: int = 128

    def model(self, seed: int) -> PreTrainedModel:
        """Return a random model: two layers of Qwen2 that never end a text, or a Qwen3 with a tied head."""
        if self.family == "qwen2":
            return endless_model(self.vocab, self.width, seed)
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.width // 4,
            tie_word_embeddings=True,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        return Qwen3ForCausalLM(config)


CASES = {
    "small head": Case(family="qwen2", width=128, layers=2, vocab=4096),
    "wide head": Case(family="qwen2", width=256, layers=2, vocab=64_000),
    "wide layers": Case(family="qwen2", width=768, layers=2, vocab=4096),
    "deep": Case(family="qwen3", width=256, layers=12, vocab=4096, batch=16, response=256),
    "deep, whole vocabulary": Case(
        family="qwen3", width=256, layers=12, vocab=4096, batch=16, response=256, kind="full"
    ),
}


TIMES = 3
"""Processes for each case: where a run is small, the allocator's ways differ by more than a tenth of it."""


def prepared(case: Case, folder: Path) -> Job:
    """Write both models, of one shape, and the prompts."""
    job = Job(folder=folder, steps=3, batch=case.batch, response=case.response)
    job.make(512)  # the prompts; the models are replaced
    words = tokenizer(case.vocab)
    for seed, name in enumerate(("student", "teacher")):
        case.model(seed).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return job


def estimated(case: Case, job: Job) -> Memory:
    """Return the estimate of the run that :func:`own.train` makes of the job."""
    run = assembled(case.kind, job)
    collector = run.data.collector
    values: dict[str, Any] = {
        "student": {"path": job.student, "dtype": "float32", "head_scratch_mb": 256},
        "teacher": {"path": job.teacher, "dtype": "float32"},
        "engine": {"_target_": "opd_lightning.engine.transformers.TransformersEngine", "batch_size": 128},
        "strategy": {"name": "auto"},
        "trainer": {
            "devices": 1,
            "num_nodes": 1,
            "accelerator": "cpu",
            "precision": "32-true",
            "max_steps": job.steps,
            "accumulate_grad_batches": 1,
        },
        "collector": {
            "prompts_per_collection": job.batch,
            "steps_per_collection": 1,
            "micro_batch_tokens": None,
            "max_prompt_tokens": job.prompt,
            "probe_rows": collector.probe_rows,
            "score_rows": collector.score_rows,
            "score_tokens": None,
        },
        "evaluation": {"every_steps": None, "settings": {"problems": 1, "samples": 0, "max_new_tokens": 1}},
    }
    assumed = Assumptions(
        prompt_tokens=job.prompt,
        response_share=1.0,
        cpu_tflops=None,
        gpu_tflops=1.0,
        utilisation=dict.fromkeys(("generate", "score", "train", "evaluate"), 0.3),
        gpus_per_node=1,
        runtime_mb=0,
    )
    optimizer = partial(torch.optim.AdamW, lr=RATE, fused=True, **ADAM)
    return memory(planned_run(values, run.module.objective, collector.rollout, optimizer, assumed))


def measured(case: Case) -> dict[str, Any]:
    """Train in this process; return measured and estimated MB."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = Job(folder=Path(folder), steps=1, response=16)
        tiny.make(512)
        train(case.kind, tiny)
    with tempfile.TemporaryDirectory() as folder:
        job = prepared(case, Path(folder))
        plan = estimated(case, job)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was left free so far would be taken for the models' own
        found, _ = train(case.kind, job)
    beside = {name: value / 1e6 for name, value in plan.parts.items() if not name.endswith(" weights")}
    weights = sum(value for name, value in plan.parts.items() if name.endswith(" weights")) / 1e6
    return {
        "measured": found["extra_mb"],
        "estimate": sum(beside.values()),
        "state": beside["gradients"] + beside["optimizer state"],
        "weights": weights,
        "phase": plan.worst,
    }


def in_a_process(name: str) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--run", name]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        print(json.dumps(measured(CASES[asked.run])))
        return
    lines = [
        f"# A plan's memory against a run's, {date.today()}",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/plan_memory.py` at commit {git_commit()}, on {cpu()}, torch "
        f"{torch.__version__}. MB (1e6 bytes) that training adds to the loaded models: gradients and Adam's state, "
        f"which are known exactly, and what comes and goes in the worst phase. Measured is the median of {TIMES} "
        "processes, with the range; the ratio is the estimate over the median.",
        "",
        "| run | student | batch | both weights | gradients, Adam | estimate | worst phase | measured | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, case in CASES.items():
        several = [in_a_process(name) for _ in range(TIMES)]
        sizes, found = sorted(one["measured"] for one in several), several[0]
        middle = statistics.median(sizes)
        shape = f"{case.family}, {case.layers} x {case.width}, vocabulary {case.vocab}"
        batch = f"{case.batch} x (32 + {case.response})"
        lines.append(
            f"| {name} | {shape} | {batch} | {found['weights']:.0f} | {found['state']:.0f} | {found['estimate']:.0f} | "
            f"{found['phase']} | {middle:.0f} ({sizes[0]:.0f} to {sizes[-1]:.0f}) | "
            f"**{found['estimate'] / middle:.2f}** |"
        )
        print(lines[-1], flush=True)
    (RESULTS / f"{date.today()}_plan_memory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
