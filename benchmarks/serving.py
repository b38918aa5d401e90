"""What does it cost to have the teacher behind serve_teacher instead of in this process?

    OMP_NUM_THREADS=1 python benchmarks/serving.py     # about two minutes

A random two-layer teacher scores 64 responses of 160 tokens behind prompts of 32: the taken token, entropy, its own
top K and K given ids, as `support=union` asks. In this process, and through HTTP on loopback from a server in a
process of its own (one thread each; client and server take turns, so that two cores gain nothing). Calls are
interleaved, the best of the repeats counts, wall time. Beside it: the same answer as JSON, as plain lists and in the
way of OpenAI-compatible servers, one dictionary a token keyed by ids; its bytes, and its writing and reading without
any HTTP.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from default_run import RESULTS, cpu
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lightning.commands import git_commit
from opd_lightning.loading import Loading
from opd_lightning.models import load_model, load_tokenizer
from opd_lightning.scorer import Scorer
from opd_lightning.serving.wire import ScoreAnswer, ScoreRequest, Wanted
from opd_lightning.teacher.served import ServedScorer, ServedTeacher
from opd_lightning.types import TokenBatch, Want

ROWS, PROMPT, TIME = 64, 32, 160
TOKENS = ROWS * TIME


def save_teacher(folder: Path, vocab: int, hidden: int) -> None:
    """Save a random teacher with the shipped tokenizer."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": hidden // 16, "num_key_value_heads": hidden // 32, "head_dim": 16}
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2, **heads
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    load_tokenizer("builtin:word_problems/teacher", "path").save_pretrained(folder)


@contextlib.contextmanager
def server(path: Path) -> Iterator[str]:
    """Serve a teacher on loopback; yield the address."""
    words = [sys.executable, "-m", "opd_lightning.serve_teacher", f"teacher.path={path}", "port=0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while "serving at " not in said:
            said = process.stdout.readline()
            assert said
        try:
            yield said.split("serving at ")[1].split()[0]
        finally:
            process.terminate()
            process.communicate()


def rows(vocab: int, k: int) -> tuple[TokenBatch, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab, (ROWS, PROMPT + TIME), generator=draw)
    there = torch.ones_like(ids, dtype=torch.bool)
    tokens = TokenBatch(
        prompt_ids=ids[:, :PROMPT],
        prompt_mask=there[:, :PROMPT],
        ids=ids[:, PROMPT:],
        mask=there[:, PROMPT:],
    )
    return tokens, torch.randint(0, vocab, (ROWS, TIME, k), generator=draw)


def best(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least seconds of each call, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - begun)
    return {name: min(seconds) for name, seconds in found.items()}


def as_lists(answer: ScoreAnswer, given: torch.Tensor) -> object:
    assert answer.top_ids is not None
    assert answer.top_logp is not None
    assert answer.given is not None
    columns = (given, answer.given, answer.top_ids, answer.top_logp, answer.taken, answer.entropy)
    return [column.tolist() for column in columns if column is not None]


def as_dictionaries(answer: ScoreAnswer, given: torch.Tensor) -> object:
    lists = as_lists(answer, given)
    assert isinstance(lists, list)
    ids = [[*one, *other] for one, other in zip(lists[0], lists[2], strict=True)]
    values = [[*one, *other] for one, other in zip(lists[1], lists[3], strict=True)]
    return [
        {
            str(i): {"logprob": v, "rank": r, "decoded_token": "word"}
            for r, (i, v) in enumerate(zip(*pair, strict=True))
        }
        for pair in zip(ids, values, strict=True)
    ]


def measured(local: Scorer, served: ServedScorer, vocab: int, k: int, repeats: int) -> str:
    """Return the cells of one model."""
    tokens, given = rows(vocab, k)
    want = Want(taken=True, entropy=True, support="exact", top=k)
    with torch.no_grad():
        own, other = local(tokens, want, given), served(tokens, want, given)
        gap = float((other.support_logp - own.support_logp).abs().max())  # type: ignore[operator]
        calls = {"local": lambda: local(tokens, want, given), "served": lambda: served(tokens, want, given)}
        seconds = best(calls, repeats)
    speed = {name: TOKENS / seconds[name] for name in calls}
    ratio = speed["served"] / speed["local"]
    return f"{speed['local']:,.0f} | {speed['served']:,.0f} | **{ratio:.2f}** | {gap:.0e} |"


def payloads(served: ServedScorer, vocab: int, k: int) -> str:
    """Return the cells of the forms that one request with its answer can have."""
    tokens, given = rows(vocab, k)
    wanted = Wanted(vocab=vocab, taken=True, entropy=True, top=k)
    request = ScoreRequest.of(tokens, given, wanted)
    answer = served._ask(request)
    ids = request.given
    seconds = best(
        {
            "ours": lambda: (
                ScoreRequest.read(ScoreRequest.of(tokens, given, wanted).write()),
                ScoreAnswer.read(answer.write(), request),
            ),
            "lists": lambda: json.loads(json.dumps(as_lists(answer, ids))),
            "dictionaries": lambda: json.loads(json.dumps(as_dictionaries(answer, ids))),
        },
        2,
    )
    sizes = [len(json.dumps(form(answer, ids)).encode()) for form in (as_lists, as_dictionaries)]
    lists, dictionaries = (f"{size / TOKENS:,.0f}" for size in sizes)
    ms = {name: f"{1000 * value:,.0f}" for name, value in seconds.items()}
    return (
        f"{len(request.write()) / TOKENS:.0f} + {len(answer.write()) / TOKENS:.0f} | {ms['ours']} | "
        f"{lists} | {ms['lists']} | {dictionaries} | {ms['dictionaries']} |"
    )


def loaded(path: Path, address: str, vocab: int) -> tuple[Scorer, ServedScorer]:
    local = Scorer(load_model(str(path), "path").eval().requires_grad_(False), vocab)
    tokenizer = load_tokenizer(str(path), "path")
    teacher = ServedTeacher(
        address=address, token_env="NONE", timeout_s=300, patience_s=10, tokens_per_request=32768
    )
    loading = Loading(
        student=local, student_path="", student_dtype="", tokenizer=tokenizer, vocab=vocab, scratch_mb=256
    )
    return local, teacher.load(loading)


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    load = ", ".join(f"{v:.1f}" for v in os.getloadavg())
    lines = [
        f"# A served teacher against one in this process, {date.today()}",
        "",
        f"`OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/serving.py` at commit {git_commit()}, "
        f"on {cpu()}, torch {torch.__version__}; load averages at the start {load}. "
        f"{ROWS} x {TIME} response tokens behind {PROMPT} of prompt, K given ids and K of the teacher's own. Best of "
        f"{asked.repeats} interleaved repeats, wall time.",
        "",
        "| vocabulary | hidden | K | local, tokens/s | served, tokens/s | served / local | largest gap, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    wire = [
        "",
        "Bytes for each response token (up + down; of JSON, down), and ms to write and read all of them once:",
        "",
        "| K | bytes | ms | JSON lists, bytes | ms | JSON dictionaries, bytes | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for vocab, hidden in ((1024, 64), (4096, 256)):
        with tempfile.TemporaryDirectory() as folder:
            save_teacher(Path(folder), vocab, hidden)
            with server(Path(folder)) as address:
                local, served = loaded(Path(folder), address, vocab)
                for k in (16, 64):
                    cells = measured(local, served, vocab, k, asked.repeats)
                    lines.append(f"| {vocab:,} | {hidden} | {k} | {cells}")
                    print(lines[-1], flush=True)
                    if len(wire) < 7:
                        wire.append(f"| {k} | {payloads(served, vocab, k)}")
                        print(wire[-1], flush=True)
    (RESULTS / f"{date.today()}_serving.md").write_text("\n".join(lines + wire) + "\n")


if __name__ == "__main__":
    main()
