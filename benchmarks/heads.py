"""The head's modes against dense logits, trl's tiles and Liger's chunks: seconds and memory, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/heads.py                      # V = 151,936, hidden 896, 4,096 tokens
    python benchmarks/heads.py --tokens 1024 --hidden 64 --width 128  # seconds: as in whole_step.py

The same hidden states, heads and ids for all, float32, on the CPU, each in a process of its own that is asked once.
Memory is what a mode adds to its inputs at its peak; of it, ``scratch`` is not the gradients of the hidden
states and the head, which every mode has to return. Liger runs where liger-kernel is installed. Linux only. Writes
a dated table into benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from steps import forget_peak, resident
from torch import Tensor
from trials import RESULTS, about_here

from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional import divergence as forms
from opd_lightning.functional.head import Head, exact, full, support_logits, top


@dataclass(frozen=True)
class Inputs:
    """What every mode gets: student and teacher at the same positions, ids to compare at."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    ids: Tensor
    teacher_logp: Tensor

    @property
    def heads(self) -> tuple[Head, Head]:
        return Head(weight=self.weight), Head(weight=self.teacher_weight)


def inputs(tokens: int, vocab: int, hidden: int, width: int, k: int) -> Inputs:
    torch.manual_seed(0)
    return Inputs(
        hidden=torch.randn(tokens, hidden).requires_grad_(),
        weight=(torch.randn(vocab, hidden) / hidden**0.5).requires_grad_(),
        teacher_hidden=torch.randn(tokens, width),
        teacher_weight=torch.randn(vocab, width) / width**0.5,
        # Some ids are much more frequent than others, as in text.
        ids=(torch.rand(tokens, k).pow(4) * vocab).long(),
        teacher_logp=torch.randn(tokens, k).log_softmax(-1),
    )


def on_support(logits: Tensor, teacher_logp: Tensor) -> Tensor:
    return forms.reverse_kl(logits.log_softmax(-1), teacher_logp).mean()


def dense_support(x: Inputs) -> None:
    on_support((x.hidden @ x.weight.T).gather(-1, x.ids), x.teacher_logp).backward()


def our_support(x: Inputs) -> None:
    on_support(support_logits(x.hidden, x.heads[0], x.ids), x.teacher_logp).backward()


def tail(logp: Tensor, teacher_logp: Tensor) -> Tensor:
    return forms.reverse_kl(forms.with_tail(logp), forms.with_tail(teacher_logp - 0.1)).mean()


def dense_tail(x: Inputs) -> None:
    logp = (x.hidden @ x.weight.T).log_softmax(-1)
    (tail(logp.gather(-1, x.ids), x.teacher_logp) - 0.01 * (logp.exp() * logp).sum(-1).mean()).backward()


def our_tail(x: Inputs) -> None:
    logp, entropy = exact(x.hidden, x.heads[0], x.ids, entropy=True)
    (tail(logp, x.teacher_logp) + 0.01 * entropy.mean()).backward()


def our_tail_alone(x: Inputs) -> None:
    tail(exact(x.hidden, x.heads[0], x.ids, entropy=False).logp, x.teacher_logp).backward()


def dense_full(x: Inputs) -> None:
    teacher = (x.teacher_hidden @ x.teacher_weight.T).log_softmax(-1)
    forms.reverse_kl((x.hidden @ x.weight.T).log_softmax(-1), teacher).mean().backward()


def our_full(x: Inputs, kind: Any = ReverseKL()) -> None:
    student, teacher = x.heads
    share = torch.full((len(x.hidden),), 1 / len(x.hidden))
    (full(x.hidden, student, x.teacher_hidden, teacher, kind, share=share) * share).sum().backward()


def our_full_unhinted(x: Inputs) -> None:
    student, teacher = x.heads
    full(x.hidden, student, x.teacher_hidden, teacher, ReverseKL()).mean().backward()


def our_jsd(x: Inputs) -> None:
    our_full(x, JSD(beta=0.5))


def trl_full(x: Inputs, beta: float = 1.0) -> None:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(x.hidden), dtype=torch.long)
    _chunked_divergence_loss(x.hidden[None], x.teacher_hidden[None], x.weight, x.teacher_weight, mask, beta)[
        0
    ].backward()


def trl_jsd(x: Inputs) -> None:
    trl_full(x, 0.5)


def liger_jsd(x: Inputs) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    labels = torch.zeros(len(x.hidden), dtype=torch.long)
    loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels).backward()


def our_top(x: Inputs) -> None:
    top(x.teacher_hidden, x.heads[1], 16, x.ids[:, :1], entropy=True)


def dense_top(x: Inputs) -> None:
    with torch.no_grad():
        logp = (x.teacher_hidden @ x.teacher_weight.T).log_softmax(-1)
        logp.topk(16), logp.gather(-1, x.ids[:, :1]), (logp.exp() * logp).sum(-1)


EASY = "renormalised on a support"  # dense logits and their gradient, and nothing more
GROUPS: dict[str, dict[str, Callable[[Inputs], None]]] = {
    EASY: {"dense": dense_support, "ours": our_support},
    "support, tail and entropy": {"dense": dense_tail, "ours": our_tail, "ours, no entropy": our_tail_alone},
    "full reverse KL": {
        "dense": dense_full,
        "trl": trl_full,
        "ours": our_full,
        "ours, shares unknown": our_full_unhinted,
        "ours, support, tail and entropy": our_tail,
    },
    "full JSD, beta 0.5": {"trl": trl_jsd, "liger": liger_jsd, "ours": our_jsd},
    "teacher: top 16, entropy, no gradient": {"dense": dense_top, "ours": our_top},
}


def one(group: str, name: str, sizes: dict[str, int]) -> dict[str, float]:
    """Measure one mode in this process, after a small one of its kind has warmed the libraries up."""
    run = GROUPS[group][name]
    run(inputs(8, 256, 16, 16, 4))
    x = inputs(**sizes)
    forget_peak()
    before = resident("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    run(x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gradients = [t.grad for t in (x.hidden, x.weight) if t.grad is not None]
    extra = resident("VmHWM") - before
    return {
        "wall": wall,
        "cpu": cpu,
        "extra": extra,
        "scratch": extra - sum(g.numel() * g.element_size() for g in gradients) / 1e6,
    }


def fits(name: str, sizes: dict[str, int]) -> bool:
    """Return whether there is memory for a dense mode: about seven tensors of all logits."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return name != "dense" or 28 * sizes["tokens"] * sizes["vocab"] < free


def child(group: str, name: str, sizes: dict[str, int]) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", group, name, *(f"--{k}={v}" for k, v in sizes.items())]
    done = subprocess.run(command, env=os.environ | {"CI": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{group}, {name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{group}, {name}: {found['cpu']:.2f} CPU s, {found['scratch']:.0f} MB", flush=True)
    return found


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """Return a line a mode; ratios are to the last of trl's or dense."""
    base = next((found[name] for name in ("trl", "dense") if name in found), next(iter(found.values())))
    lines = [
        "| | CPU s | seconds | times as fast | extra MB | scratch MB | of that scratch |",
        f"|{'---|' * 7}",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['cpu']:.2f} | {row['wall']:.2f} | {base['cpu'] / row['cpu']:.1f} | {row['extra']:.0f} | "
            f"{row['scratch']:.0f} | {row['scratch'] / base['scratch']:.2f} |"
        )
    return lines


def main() -> None:
    """Run all modes in turn, print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"tokens": 4096, "vocab": 151_936, "hidden": 896, "width": 896, "k": 32}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in numbers}
    if args.one:
        print(json.dumps(one(*args.one, sizes)))
        return
    lines = []
    for group, modes in GROUPS.items():
        there = importlib.util.find_spec("liger_kernel") is not None
        asked = [name for name in modes if there or name != "liger"]
        found = {name: child(group, name, sizes) for name in asked if group == EASY or fits(name, sizes)}
        lines += ["", f"## {group}", "", *table(found)]
        if "dense" in modes and "dense" not in found:
            lines += ["", "Dense logits had no room."]
    command = " ".join(["python benchmarks/heads.py", *sys.argv[1:]])
    threads = f"{torch.get_num_threads()} thread(s)"
    title = f"# Head: V = {args.vocab:,}, hidden {args.hidden} and {args.width}, {args.tokens:,} tokens, K = {args.k}"
    text = "\n".join([f"{title}, {date.today()}", "", about_here(command, threads), *lines]) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{date.today()}_heads_h{args.hidden}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
