"""Which layout of ragged rows is fastest: padded, buckets or packed, when a teacher scores and a student learns?

    OMP_NUM_THREADS=1 python benchmarks/layouts.py     # about two minutes on a CPU
    python benchmarks/layouts.py --device cuda --dtype bfloat16

Rows: responses of the built-in student to its own task, and 24 rows of 16 to 256 tokens, uniformly. Models: the
built-in ones and one of 1.5 million weights. Layouts are interleaved, so that other work on the machine
hits all alike, and the best of the repeats counts; CPU seconds of the process on a CPU. The last table is
of the one constant of the cut, what a call of a layer costs by itself. Writes a dated table into results.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import transformers
from default_run import RESULTS, cpu
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lightning import layout as layouts
from opd_lightning.commands import git_commit
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.models import load_model, load_tokenizer, stop_ids
from opd_lightning.prompts import Prompts
from opd_lightning.scorer import Scorer
from opd_lightning.task.word_problems import WordProblems
from opd_lightning.types import Sampling, TokenBatch, Want

K = 32
LAYOUTS = ("padded", "buckets", "packed")
WORK = (1e6, 1e7, 2e7, 4e7, 1e8)


def real_rows(rows: int) -> TokenBatch:
    """Prompts of the built-in task with the built-in student's own responses."""
    path = "builtin:word_problems/student"
    model, tokenizer = load_model(path, "student.path").eval(), load_tokenizer(path, "student.path")
    problems = WordProblems().problems("train")
    prompts = Prompts(problems=problems, tokenizer=tokenizer, max_tokens=512, long="refuse", seed=0)
    sampling = Sampling(max_new_tokens=128, top_p=0.9, stop_ids=stop_ids(model, tokenizer), vocab=432)
    batch = prompts.stream(range(rows))
    drawn = TransformersEngine().generate(model, batch, sampling)
    return TokenBatch(prompt_ids=batch.ids, prompt_mask=batch.mask, ids=drawn.ids, mask=drawn.mask)


def uniform_rows(rows: int, low: int = 16, high: int = 256) -> TokenBatch:
    """Rows of ``low`` to ``high`` tokens, a quarter of each of them prompt."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (rows,), generator=draw)
    prompts = lengths // 4
    ids = torch.randint(10, 430, (rows, 2, high), generator=draw)
    place = torch.arange(high)
    return TokenBatch(
        prompt_ids=ids[:, 0],
        prompt_mask=place >= high - prompts.unsqueeze(-1),
        ids=ids[:, 1],
        mask=place < (lengths - prompts).unsqueeze(-1),
    )


def medium() -> Qwen3ForCausalLM:
    """A random model of 1.5 million weights."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32}
    shape: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=448, tie_word_embeddings=True, **shape, **heads))


def scoring(scorer: Scorer, parts: list[TokenBatch]) -> Callable[[], None]:
    """A teacher's pass: log-prob, entropy and top-K of each response token."""

    @torch.no_grad()
    def run() -> None:
        for tokens in parts:
            scorer(tokens, Want(taken=True, entropy=True, top=K))

    return run


def learning(scorer: Scorer, parts: list[TokenBatch]) -> Callable[[], None]:
    """A student's forward and backward on a support of K ids."""
    ids = [torch.randint(0, 430, (*tokens.ids.shape, K), device=tokens.ids.device) for tokens in parts]

    def run() -> None:
        scorer.zero_grad()
        for tokens, support in zip(parts, ids, strict=True):
            logp = scorer(tokens, Want(support="renormalised"), support).support_logp
            assert logp is not None
            logp.sum().backward()

    return run


def by_length(tokens: TokenBatch, rows: int) -> list[TokenBatch]:
    """Cut a batch as the collector does for scoring: sorted by length, so many rows at a time."""
    order = torch.argsort(tokens.prompt_mask.sum(-1) + tokens.mask.sum(-1))
    return [tokens.rows(part) for part in order.split(rows)]


def clock(device: str) -> float:
    """CPU seconds of the process, or seconds after the device is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(runs: dict[Any, Callable[[], None]], repeats: int, device: str) -> dict[Any, float]:
    """Return the best seconds of each, run in turns."""
    best = dict.fromkeys(runs, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begun = clock(device)
            run()
            if repeat:
                best[name] = min(best[name], clock(device) - begun)
    return best


def set_work(scorer: Scorer, run: Callable[[], None], work: float, device: str) -> Callable[[], None]:
    """Return ``run`` under another cost of a call."""

    def other() -> None:
        before = layouts.CALL_WORK[device]
        layouts.CALL_WORK[device] = work
        run()
        layouts.CALL_WORK[device] = before

    return other


def cases(
    device: str, dtype: torch.dtype
) -> dict[tuple[str, str, str], tuple[Scorer, Any, list[TokenBatch]]]:
    """Rows, model and half: what a micro-batch and a scoring pass of each are made of."""
    real, uniform = real_rows(32).to(device), uniform_rows(24).to(device)
    student = load_model("builtin:word_problems/student", "student.path")
    teacher = load_model("builtin:word_problems/teacher", "teacher.path")
    models = {"built-in student": student, "built-in teacher": teacher, "1.5 M": medium()}
    scorers = {name: Scorer(model.to(device, dtype)) for name, model in models.items()}  # type: ignore[call-overload]
    first = [real.rows(slice(i, i + 16)) for i in range(0, 32, 16)]
    return {
        ("task", "built-in teacher", "scoring"): (scorers["built-in teacher"], scoring, by_length(real, 32)),
        ("task", "built-in student", "learning"): (scorers["built-in student"], learning, first),
        ("task", "1.5 M", "scoring"): (scorers["1.5 M"], scoring, by_length(real, 32)),
        ("task", "1.5 M", "learning"): (scorers["1.5 M"], learning, first),
        ("uniform", "built-in teacher", "scoring"): (scorers["built-in teacher"], scoring, [uniform]),
        ("uniform", "built-in student", "learning"): (scorers["built-in student"], learning, [uniform]),
        ("uniform", "1.5 M", "scoring"): (scorers["1.5 M"], scoring, [uniform]),
        ("uniform", "1.5 M", "learning"): (scorers["1.5 M"], learning, [uniform]),
    }


def with_layout(scorer: Scorer, run: Callable[[], None], layout: str) -> Callable[[], None]:
    """Return ``run`` under another layout."""

    def other() -> None:
        scorer.layout = layout
        run()

    return other


def waste(parts: list[TokenBatch]) -> str:
    """Return the share of padding in padded calls."""
    lengths = [layouts.Rows.of(tokens).lengths for tokens in parts]
    computed = sum(int(n.max()) * len(n) for n in lengths)
    return f"{1 - sum(int(n.sum()) for n in lengths) / computed:.0%}"


def compared(
    scorer: Scorer, run: Callable[[], None], parts: list[TokenBatch], repeats: int, device: str
) -> str:
    """Return the cells of each layout."""
    ms = timed({name: with_layout(scorer, run, name) for name in LAYOUTS}, repeats, device)
    return (
        f"{waste(parts)} | {' | '.join(f'{1000 * ms[n]:.1f}' for n in LAYOUTS)} | "
        f"**{ms['padded'] / ms['buckets']:.2f}** | {ms['padded'] / ms['packed']:.2f} |"
    )


def by_work(scorer: Scorer, run: Callable[[], None], repeats: int, device: str) -> str:
    """Return the cells of buckets by what a call is taken to cost."""
    scorer.layout = "buckets"
    seconds = timed({work: set_work(scorer, run, work, device) for work in WORK}, repeats, device)
    return f"{' | '.join(f'{1000 * seconds[work]:.1f}' for work in WORK)} |"


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    lines = [
        f"# Layouts of ragged rows, {date.today()}",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/layouts.py --device {asked.device} "
        f"--dtype {asked.dtype}` at commit {git_commit()}, on {cpu()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; load averages at the start {', '.join(f'{v:.1f}' for v in os.getloadavg())}. "
        f"Best of {asked.repeats} interleaved repeats; ratio to padded, above 1 is faster.",
        "",
        "| rows | model | half | padding | padded, ms | buckets, ms | packed, ms | buckets | packed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    constant = [
        "",
        "Buckets, by the floating-point operations that a call of a layer is taken to cost (`CALL_WORK`), ms:",
        "",
        f"| rows | model | half | {' | '.join(f'{w:.0e}' for w in WORK)} |",
        f"|---|---|---|{'---|' * len(WORK)}",
    ]
    for (rows, model, half), (scorer, make, parts) in cases(
        asked.device, getattr(torch, asked.dtype)
    ).items():
        run, name = make(scorer, parts), f"| {rows} | {model} | {half} |"
        lines.append(f"{name} {compared(scorer, run, parts, asked.repeats, asked.device)}")
        print(lines[-1], flush=True)
        if model.startswith("built-in"):
            constant.append(f"{name} {by_work(scorer, run, asked.repeats, asked.device)}")
            print(constant[-1], flush=True)
    (RESULTS / f"{date.today()}_layouts.md").write_text("\n".join(lines + constant) + "\n")


if __name__ == "__main__":
    main()
