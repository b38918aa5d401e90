"""How fast does the engine generate, against the library's own loop?

    OMP_NUM_THREADS=1 python benchmarks/generation.py
    python benchmarks/generation.py --device cuda --graphs            # a machine with a GPU
    python benchmarks/generation.py --device cuda --graphs --student random_0_6b --dtype bfloat16 --max-new-tokens 512

Tokens per CPU second (all threads of the process together), on a GPU per second, on the built-in task,
natural ends of text, sampled at temperature 1. The runs are interleaved, so that other work on the machine
hits all of them alike, and the best of the repeats counts. --graphs sets engine.graphs on beside off.
Writes a dated table into benchmarks/results.
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


SHAPES: dict[str, dict[str, Any]] = {
    "random": {
        "vocab_size": 432,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "intermediate_size": 192,
        "head_dim": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "random_0_6b": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "head_dim": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}
"""Of the built-in student and of Qwen3-0.6B."""


def random_student(name: str, rows: int) -> tuple[PreTrainedModel, PromptBatch, tuple[int, ...], str]:
    """A stand-in of a student's shape: near-uniform logits, so that 5 of 432 ids end a row after ~86."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    vocab = shape["vocab_size"]
    model = Qwen3ForCausalLM(Qwen3Config(eos_token_id=None, tie_word_embeddings=True, **shape))
    lengths = torch.randint(46, 96, (rows,))
    mask = torch.arange(96) >= 96 - lengths[:, None]
    ids = torch.randint(10, vocab, mask.shape) * mask
    problems = tuple(Problem(index=i, messages=()) for i in range(rows))
    prompts = PromptBatch(ids=ids, mask=mask, problems=problems, seeds=tuple(range(rows)))
    what = f"random weights in the shape of {'the student' if name == 'random' else 'Qwen3-0.6B'}"
    return model.eval(), prompts, tuple(range(2, 2 + vocab // 86)), what


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
    ended = torch.isin(out[:, prompts.ids.shape[1] :], torch.tensor(stops, device=out.device)).long()
    return int((ended.cumsum(-1) - ended == 0).sum())


def engine(
    batch_size: int, method: str, graphs: bool = False
) -> Callable[[PreTrainedModel, PromptBatch, Sampling], int]:
    def run(model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> int:
        chosen = TransformersEngine(batch_size=batch_size, method=method, graphs=graphs)
        generation: Generation = chosen.generate(model, prompts, sampling)
        return int(generation.mask.sum())

    return run


def clock(device: str) -> float:
    """Return seconds: of the processor, or on a GPU of the wall, once it has done what it was given."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    args: argparse.Namespace, model: PreTrainedModel, prompts: PromptBatch, stops: tuple[int, ...]
) -> str:
    sampling = Sampling(max_new_tokens=args.max_new_tokens, stop_ids=stops)
    runs = {BASELINE: library, "engine, method=generate": engine(128, "generate")}
    runs |= {f"engine, method=loop, batch_size={n}": engine(n, "loop") for n in (32, 64, 128)}
    runs["engine, method=loop, top_ids=16"] = lambda m, p, s: engine(128, "loop")(
        m, p, Sampling(max_new_tokens=s.max_new_tokens, stop_ids=s.stop_ids, top_ids=16)
    )
    if args.graphs:
        runs |= {
            f"engine, graphs=true, batch_size={n}": engine(n, "loop", graphs=True) for n in (32, 64, 128)
        }
    best: dict[str, tuple[float, float]] = dict.fromkeys(runs, (0.0, 0.0))
    for _ in range(args.repeats):
        for name, run in runs.items():
            start = clock(args.device)
            tokens = run(model, prompts, sampling)
            best[name] = max(best[name], (tokens / (clock(args.device) - start), tokens / len(prompts)))
    rows = [
        f"| {name} | {rate:,.0f} | {rate / best[BASELINE][0]:.2f} | {mean:.0f} |"
        for name, (rate, mean) in best.items()
    ]
    second = "CPU second" if args.device == "cpu" else "second"
    head = [f"| | tokens per {second} | ratio | tokens a row |", "|---|---:|---:|---:|"]
    return "\n".join(head + rows)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default="builtin:word_problems/student", help=f"or: {', '.join(SHAPES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--graphs", action="store_true", help="engine.graphs=true beside false")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU, and torch sees none here")
    there = args.student not in SHAPES and Path(model_path(args.student)).exists()
    model, prompts, stops, what = (
        trained_student(args.student, args.prompts)
        if there
        else random_student(args.student if args.student in SHAPES else "random", args.prompts)
    )
    model, prompts = model.to(args.device, getattr(torch, args.dtype)), prompts.to(args.device)
    load = os.getloadavg()[0]
    table = measure(args, model, prompts, stops)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    machine = processor() if args.device == "cpu" else f"{torch.cuda.get_device_name()}, {processor()}"
    text = f"""# Generation speed, {today}

{table}

{args.prompts} prompts ({what}, {model.config.num_key_value_heads} key heads), at most {args.max_new_tokens} new
tokens, temperature 1, {args.dtype}, natural ends, best of {args.repeats} interleaved runs, {args.threads} thread(s).
The ratio is to `{BASELINE}` on all prompts at once; tokens after a row's end do not count.

- command: `OMP_NUM_THREADS={args.threads} python benchmarks/{" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}`
- commit: {commit.stdout.strip()}
- machine: {machine}, {os.cpu_count()} cores, shared; load {load:.1f} before the runs
- torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}
"""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{today}-generation{'' if args.device == 'cpu' else '_cuda'}.md").write_text(text)


if __name__ == "__main__":
    main()
