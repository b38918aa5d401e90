"""How far is the head from its matrix products on a GPU, and what do the Triton kernels gain?

    python benchmarks/head_gpu.py

16k positions, hidden 2048, a vocabulary of 151,936, bf16, forward and backward. The floor is the head's own
matrix products and nothing else: three (logits, both gradients), or four with the logits computed twice.
"kernels" is what the package does on a GPU, "torch" the same functions with the kernels switched off. All
cases are run in turn, again and again, so that a warm or throttled device meets all alike; the median counts.
Writes a dated table into benchmarks/results. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_timing import Case, Found, measure
from torch import Tensor

from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.divergence import renormalise, reverse_kl
from opd_lightning.functional.head import SCRATCH, Head, exact, full, support_logits
from opd_lightning.functional.head.spec import Finish
from opd_lightning.functional.head.triton_gather import gather_backward, gather_dot
from opd_lightning.functional.head.triton_rows import compare, gradient_
from opd_lightning.functional.head.triton_rows import statistics as row_statistics

ROOT = Path(__file__).resolve().parents[1]
MIB, GIB = 1 << 20, 1 << 30
THREE, FOUR = "floor, three products", "floor, four products"


class Data:
    """Hidden states, heads and ids, of both kinds: uniform ones, and ones as frequent as words are."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        draw = torch.Generator(device).manual_seed(0)
        n, width, vocab = args.tokens, args.hidden, args.vocab

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=draw, device=device)).bfloat16()

        # Logits with a spread of about 2: entropies of a language model's order.
        spread = 2.0 / width**0.5
        self.hidden = random(n, width).requires_grad_()
        self.weight = random(vocab, width, scale=spread).requires_grad_()
        self.target, self.teacher = random(n, width), Head(weight=random(vocab, width, scale=spread))
        self.head = Head(weight=self.weight)
        self.uniform = torch.randint(vocab, (n, args.k), generator=draw, device=device)
        spots = torch.rand(n, args.k, generator=draw, device=device, dtype=torch.float64)
        self.zipf = (float(vocab) ** spots).long().sub_(1).clamp_(0, vocab - 1)
        self.support = random(n, args.k).float().log_softmax(-1)
        self.share = torch.full((n,), 1.0 / n, device=device)


def backward(data: Data, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (data.hidden, data.weight))


def floors(data: Data) -> list[Case]:
    """The products alone, into memory that is there."""
    hidden, weight = data.hidden.detach(), data.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    into_hidden, into_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run(forwards: int) -> None:
        for _ in range(forwards):
            torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=into_hidden)
        torch.mm(logits.T, hidden, out=into_weight)

    return [Case(name=THREE, run=lambda: run(1)), Case(name=FOUR, run=lambda: run(2))]


def liger(data: Data) -> Case | None:
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        return None
    loss = LigerFusedLinearJSD(jsd_beta=0.5)

    def run() -> object:
        return backward(data, loss(data.hidden, data.weight, data.target, data.teacher.weight))

    return Case(name="Liger, fused linear JSD 0.5", run=run)


def modes(data: Data, args: argparse.Namespace) -> list[Case]:
    """The public functions, forward and backward, with kernels and without."""
    head, share = data.head, data.share

    def scored(entropy: bool) -> object:
        got = exact(data.hidden, head, data.zipf, entropy=entropy, scratch=args.scratch * MIB)
        loss = got.logp.mean() if got.entropy is None else got.logp.mean() + got.entropy.mean()
        return backward(data, loss)

    def on_support(ids: Tensor) -> object:
        student = renormalise(support_logits(data.hidden, head, ids))
        return backward(data, reverse_kl(student, data.support).mean())

    def compared(divergence: Callable[[Tensor, Tensor], Tensor]) -> object:
        value = full(
            data.hidden, head, data.target, data.teacher, divergence, share=share, scratch=args.scratch * MIB
        )
        return backward(data, (value * share).sum())

    runs: dict[str, Callable[[], object]] = {
        f"exact, K = {args.k}": lambda: scored(False),
        f"exact, K = {args.k}, with entropies": lambda: scored(True),
        f"renormalised, K = {args.k}, ids as words": lambda: on_support(data.zipf),
        f"renormalised, K = {args.k}, ids uniform": lambda: on_support(data.uniform),
        "full, reverse KL": lambda: compared(ReverseKL()),
        "full, JSD 0.5": lambda: compared(JSD(beta=0.5)),
    }
    return [
        Case(name=f"{name}, {how}", run=run, kernels=how == "kernels")
        for name, run in runs.items()
        for how in ("kernels", "torch")
    ]


def single_kernels(data: Data, args: argparse.Namespace) -> list[Case]:
    """Each kernel alone, and the bytes that it cannot do without."""
    hidden, weight, finish = data.hidden.detach(), data.weight.detach(), Finish()
    rows = max(1, min(len(hidden), args.scratch * MIB // (2 * len(weight))))
    raw, other = hidden[:rows] @ weight.T, data.target[:rows] @ data.teacher.weight.T
    lse, entropy = row_statistics(raw, finish, entropy=True)
    grad = torch.randn(data.uniform.shape, device=hidden.device)
    size, width = raw.numel() * raw.element_size(), weight.shape[1] * weight.element_size()
    gathered, out = data.uniform.numel() * width, hidden.numel() * 2
    found = [
        Case(
            name=f"normaliser of {rows} rows",
            run=lambda: row_statistics(raw, finish, entropy=False),
            moved=size,
        ),
        Case(
            name=f"normaliser and entropy of {rows} rows",
            run=lambda: row_statistics(raw, finish, entropy=True),
            moved=size,
        ),
        Case(
            name=f"their gradient, {rows} rows",
            run=lambda: gradient_(raw.clone(), finish, lse, lse, entropy, lse),
            moved=4 * size,  # a copy and the gradient
        ),
        Case(
            name=f"JSD 0.5 and its gradient, {rows} rows",
            run=lambda: compare(raw.clone(), finish, other, finish, 0.5, False, gradient=True),
            moved=9 * size,  # a copy; normalisers, value and gradient read both sides; one write
        ),
    ]
    for kind, ids in (("as words", data.zipf), ("uniform", data.uniform)):
        for into in ("logits", "hidden states", "weight"):
            found.append(
                Case(
                    name=f"gathered {into}, ids {kind}",
                    run=_gather(into, grad, hidden, weight, ids),
                    moved=gathered + out + (weight.numel() * 2 if into == "weight" else 0),
                )
            )
    return found


def _gather(into: str, grad: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor) -> Callable[[], object]:
    if into == "logits":
        return lambda: gather_dot(hidden, weight, ids)
    flags = {"into_hidden": into == "hidden states", "into_weight": into == "weight"}
    return lambda: gather_backward(grad, hidden, weight, ids, **flags)


def mode_table(found: dict[str, Found]) -> str:
    three, four = found[THREE].ms, found[FOUR].ms
    lines = ["| | ms | of three products | of four | scratch, GiB |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {name} | {x.ms:.2f} | {x.ms / three:.2f} | {x.ms / four:.2f} | {x.scratch / GIB:.2f} |"
        if x.times
        else f"| {name} | out of memory | | | |"
        for name, x in found.items()
    ]
    return "\n".join(lines)


def kernel_table(cases: list[Case], found: dict[str, Found]) -> str:
    lines = ["| kernel | ms | GB/s of what it must move |", "|---|---:|---:|"]
    lines += [
        f"| {case.name} | {found[case.name].ms:.3f} | {case.moved / found[case.name].ms / 1e6:,.0f} |"
        for case in cases
    ]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--scratch", type=int, default=SCRATCH // MIB, help="MiB of logits alive at once")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def machine() -> str:
    device = torch.cuda.get_device_properties(0)
    return (
        f"{device.name}, {device.total_memory / GIB:.0f} GiB; torch {torch.__version__}, Triton {version('triton')}, "
        f"Python {platform.python_version()}"
    )


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/head_gpu.py measures a GPU and needs a CUDA device: none is here.")
    data = Data(args, "cuda")
    found = measure([*floors(data), *modes(data, args), *filter(None, [liger(data)])], args.repeats)
    torch.cuda.empty_cache()
    alone = single_kernels(data, args)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    today = datetime.date.today().isoformat()
    text = f"""# The head on a GPU, {today}

{args.tokens:,} positions, hidden {args.hidden}, vocabulary {args.vocab:,}, bf16, forward and backward into hidden
states and weight, {args.scratch} MiB of logits at once; the median of {args.repeats} interleaved runs. Scratch is the
peak beside inputs and results.

{mode_table(found)}

Full modes hold one more product, of the teacher's head. Liger computes its gradients in the forward pass.

{kernel_table(alone, measure(alone, args.repeats))}

- command: `python benchmarks/{" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}`
- commit: {commit.stdout.strip()}
- machine: {machine()}
"""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{today}-head_gpu.md").write_text(text)


if __name__ == "__main__":
    main()
