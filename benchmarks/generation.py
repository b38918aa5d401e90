"""How fast does the engine generate, against the library's own loop?

    OMP_NUM_THREADS=1 python benchmarks/generation.py

Tokens per CPU second (all threads of the process together) on the built-in task, natural ends of text,
sampled at temperature 1. The runs are interleaved, so that other work on the machine hits all of them
alike, and the best of the repeats counts. Writes a dated table into benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.models import load_model, load_tokenizer, stop_ids
from opd_lightning.paths import model_path
from opd_lightning.prompts import Prompts
from opd_lightning.task.word_problems import WordProblems
from opd_lightning.types import Generation, Problem, PromptBatch, Sampling

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "model.generate"


def random_student(rows: int) -> tuple[PreTrainedModel, PromptBatch, tuple[int, ...], str]:
    """A stand-in of the student's shape: near-uniform logits, so that 5 of 432 ids end a row after ~86."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "intermediate_size": 192,
        "head_dim": 24,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=432, eos_token_id=None, **shape, **heads))
    lengths = torch.randint(46, 96, (rows,))
    mask = torch.arange(96) >= 96 - lengths[:, None]
    ids = torch.randint(10, 432, mask.shape) * mask
    problems = tuple(Problem(index=i, messages=()) for i in range(rows))
    prompts = PromptBatch(ids=ids, mask=mask, problems=problems, seeds=tuple(range(rows)))
    return model.eval(), prompts, (2, 3, 4, 5, 6), "random weights in the student's shape"


def trained_student(path: str, rows: int) -> tuple[PreTrainedModel, PromptBatch, tuple[int, ...], str]:
    model, tokenizer = load_model(path, "student.path").eval(), load_tokenizer(path, "student.path")
    problems = WordProblems(min_steps=2, max_steps=8).problems("train")
    prompts = Prompts(problems=problems, tokenizer=tokenizer, max_tokens=256, long="refuse", seed=0)
    return model, prompts.stream(range(rows)), stop_ids(model, tokenizer), path


@torch.no_grad()
def library(model: Any, prompts: PromptBatch, sampling: Sampling) -> int:
    """Tokens that one plain call of Hugging Face's sampler writes, up to each row's end."""
    stops = list(sampling.stop_ids)
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=sampling.max_new_tokens, eos_token_id=stops, pad_token_id=0
    )
    out = model.generate(
        input_ids=prompts.ids, attention_mask=prompts.mask.long(), generation_config=settings
    )
    ended = torch.isin(out[:, prompts.ids.shape[1] :], torch.tensor(stops)).long()
    return int((ended.cumsum(-1) - ended == 0).sum())


def engine(batch_size: int, method: str) -> Callable[[PreTrainedModel, PromptBatch, Sampling], int]:
    def run(model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> int:
        chosen = TransformersEngine(batch_size=batch_size, method=method)
        generation: Generation = chosen.generate(model, prompts, sampling)
        return int(generation.mask.sum())

    return run


def measure(
    args: argparse.Namespace, model: PreTrainedModel, prompts: PromptBatch, stops: tuple[int, ...]
) -> str:
    sampling = Sampling(max_new_tokens=args.max_new_tokens, stop_ids=stops)
    runs = {BASELINE: library, "engine, method=generate": engine(128, "generate")}
    runs |= {f"engine, method=loop, batch_size={n}": engine(n, "loop") for n in (32, 64, 128)}
    runs["engine, method=loop, top_ids=16"] = lambda m, p, s: engine(128, "loop")(
        m, p, Sampling(max_new_tokens=s.max_new_tokens, stop_ids=s.stop_ids, top_ids=16)
    )
    best: dict[str, tuple[float, float]] = dict.fromkeys(runs, (0.0, 0.0))
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = time.process_time()
            tokens = run(model, prompts, sampling)
            best[name] = max(best[name], (tokens / (time.process_time() - start), tokens / len(prompts)))
    rows = [
        f"| {name} | {rate:,.0f} | {rate / best[BASELINE][0]:.2f} | {mean:.0f} |"
        for name, (rate, mean) in best.items()
    ]
    head = ["| | tokens per CPU second | ratio | tokens a row |", "|---|---:|---:|---:|"]
    return "\n".join(head + rows)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="builtin:word_problems/student", help="or: random")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    there = args.student != "random" and Path(model_path(args.student)).exists()
    model, prompts, stops, what = (
        trained_student(args.student, args.prompts) if there else random_student(args.prompts)
    )
    load = os.getloadavg()[0]
    table = measure(args, model, prompts, stops)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    text = f"""# Generation speed, {today}

{table}

{args.prompts} prompts ({what}, {model.config.num_key_value_heads} key heads), at most {args.max_new_tokens} new
tokens, temperature 1, natural ends, best of {args.repeats} interleaved runs, {args.threads} thread(s). The ratio
is to `{BASELINE}` on all prompts at once; tokens after a row's end do not count.

- command: `OMP_NUM_THREADS={args.threads} python benchmarks/{" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}`
- commit: {commit.stdout.strip()}
- machine: {processor()}, {os.cpu_count()} cores, shared; load {load:.1f} before the runs
- torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}
"""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{today}-generation.md").write_text(text)


if __name__ == "__main__":
    main()
