"""How do the loss and a whole learning step grow with tokens, vocabulary, K and response length?

    python benchmarks/growth.py             # about five minutes on one core
    python benchmarks/growth.py --only head

The head alone: hidden states of width 64 in, a reverse KL, gradients of hidden states and head out, in our
three modes and as plain autograd on dense logits, where those fit. The whole step: two-layer Qwen2 as in
whole_step.py, the default method. CPU seconds, and the peak memory beyond what every way needs: the gradient
of the head, for the whole step all gradients and Adam's moments. Needs Linux. Writes a dated table and a
picture into benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from steps import Job, forget_peak, resident
from torch import Tensor
from trials import RESULTS, about_here

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.divergence import FORMS, reverse_kl
from opd_lightning.functional.head import Head, exact, full, support_logits

WIDTH, DENSE_LIMIT_MB = 64, 6000
AXES = {
    "tokens": "tokens of the loss",
    "vocab": "vocabulary",
    "k": "ids at a position (K)",
    "response": "response length",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: the axis that was varied and its value, what was run, CPU seconds and extra MB."""

    axis: str
    x: int
    what: str
    seconds: float
    mb: float


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a loss: positions, ids in the vocabulary, ids at a position."""

    tokens: int = 2048
    vocab: int = 151_936
    k: int = 16


class Inputs:
    """Hidden states and heads of both models, a support and the teacher's logits on it."""

    def __init__(self, size: Size) -> None:
        draw = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        self.size = size
        self.hidden, self.weight = random(size.tokens, WIDTH), random(size.vocab, WIDTH) / WIDTH**0.5
        self.teacher_hidden, teacher = random(size.tokens, WIDTH), random(size.vocab, WIDTH) / WIDTH**0.5
        self.head, self.teacher_head = Head(weight=self.weight), Head(weight=teacher)
        # Distinct ids without ranking the vocabulary: a random start and a stride.
        start = torch.randint(size.vocab, (size.tokens, 1), generator=draw)
        self.ids = (start + torch.arange(size.k) * (size.vocab // size.k)) % size.vocab
        self.valid = torch.ones_like(self.ids, dtype=torch.bool)
        self.teacher_logp = random(size.tokens, size.k).log_softmax(-1) - 1.0
        for leaf in (self.hidden, self.weight):
            leaf.requires_grad_()


def renormalised(d: Inputs) -> Tensor:
    """K rows of the head at each position."""
    form = FORMS["renormalised"]
    student = form(support_logits(d.hidden, d.head, d.ids), d.valid)
    return reverse_kl(student, form(d.teacher_logp, d.valid)).mean()


def tail(d: Inputs) -> Tensor:
    """The support and all the rest as one more category, under the true normaliser."""
    form = FORMS["tail"]
    student = form(exact(d.hidden, d.head, d.ids, entropy=False).logp, d.valid)
    return reverse_kl(student, form(d.teacher_logp, d.valid)).mean()


def whole(d: Inputs) -> Tensor:
    """The whole vocabulary, both heads."""
    share = torch.full((d.size.tokens,), 1 / d.size.tokens)
    values = full(d.hidden, d.head, d.teacher_hidden, d.teacher_head, ReverseKL(), share=share)
    return (values * share).sum()


def dense(d: Inputs) -> Tensor:
    """The whole vocabulary, by autograd on the logits of all positions."""
    student = (d.hidden @ d.weight.T).log_softmax(-1)
    with torch.no_grad():
        teacher = (d.teacher_hidden @ d.teacher_head.weight.T).log_softmax(-1)
    return reverse_kl(student, teacher).mean()


LOSSES: dict[str, Callable[[Inputs], Tensor]] = {
    "renormalised": renormalised,
    "exact (tail)": tail,
    "full": whole,
    "dense autograd": dense,
}
STEP = "whole step"


def settle() -> None:
    """Give freed memory back, so that the next peak is its own."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def head_point(axis: str, what: str, size: Size) -> Point:
    """Measure one loss, forward and backward: the best of three where it is short."""
    inputs = Inputs(size)
    seconds, peaks = [], []
    while not seconds or (len(seconds) < 3 and seconds[0] < 1.0):
        inputs.hidden.grad = inputs.weight.grad = None
        settle()
        forget_peak()
        before, start = resident("VmRSS"), time.process_time()
        LOSSES[what](inputs).backward()
        seconds.append(time.process_time() - start)
        peaks.append(resident("VmHWM") - before)
    gradient = inputs.weight.numel() * 4 / 1e6
    x = getattr(size, axis)
    # The first pass also loads code and lets the allocator reach its size.
    return Point(axis=axis, x=x, what=what, seconds=min(seconds), mb=max(peaks[-1] - gradient, 0.0))


def head_points() -> list[Point]:
    """Vary one size of the loss at a time."""
    series: dict[str, Sequence[Size]] = {
        "tokens": [Size(tokens=n) for n in (512, 1024, 2048, 4096, 8192)],
        "vocab": [Size(vocab=v) for v in (8_192, 32_000, 65_536, 151_936)],
        "k": [Size(k=k) for k in (8, 16, 32, 64, 128)],
    }
    points = []
    for axis, sizes in series.items():
        for what in LOSSES:
            if axis == "k" and what in ("full", "dense autograd"):
                continue
            for size in sizes:
                # Logits, log-probs and gradients of both models: about eight tensors of [tokens, vocab].
                if what == "dense autograd" and 8 * size.tokens * size.vocab * 4e-6 > DENSE_LIMIT_MB:
                    continue
                points.append(head_point(axis, what, size))
                print(points[-1], flush=True)
    return points


@dataclass(frozen=True, kw_only=True)
class Course:
    """The sizes of a whole step."""

    batch: int = 8
    response: int = 128
    vocab: int = 32_000
    k: int = 16

    @property
    def tokens(self) -> int:
        """Tokens of the loss."""
        return self.batch * self.response


def step_point(axis: str, course: Course, folder: Path) -> Point:
    """Measure whole steps of the default method: generation, scoring, loss, optimizer."""
    import own

    job = Job(folder=folder / str(course.vocab), steps=4, batch=course.batch, response=course.response)
    if not job.folder.exists():
        with contextlib.redirect_stderr(io.StringIO()):
            job.make(course.vocab)
    settle()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        result, _ = own.train("default", job, course.k)
    seconds = min(lap["cpu"] for lap in result["laps"][1:])
    extra = result["extra_mb"] - result["state_mb"]
    return Point(axis=axis, x=getattr(course, axis), what=STEP, seconds=seconds, mb=max(extra, 0.0))


def step_points() -> list[Point]:
    """Vary one size of a whole step at a time."""
    middle = Course()
    series: dict[str, Sequence[Course]] = {
        "tokens": [replace(middle, batch=b) for b in (4, 8, 16, 32)],
        "vocab": [replace(middle, vocab=v) for v in (8_192, 32_000, 151_936)],
        "k": [replace(middle, k=k) for k in (8, 16, 32, 64, 128)],
        "response": [replace(middle, response=n) for n in (32, 64, 128, 256, 512)],
    }
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for axis, courses in series.items():
            for course in courses:
                points.append(step_point(axis, course, Path(folder)))
                print(points[-1], flush=True)
    return points


def table(axis: str, points: Sequence[Point]) -> list[str]:
    """Return one axis as a table: CPU seconds and extra MB of everything that was run."""
    found = {(p.what, p.x): p for p in points if p.axis == axis}
    names = [name for name in (*LOSSES, STEP) if any(what == name for what, _ in found)]
    lines = [f"| {AXES[axis]} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for x in sorted({x for _, x in found}):
        cells = []
        for name in names:
            point = found.get((name, x))
            cells.append("" if point is None else f"{point.seconds:.3g} s, {point.mb:.0f} MB")
        lines.append(f"| {x:,} | {' | '.join(cells)} |")
    return lines


def picture(points: Sequence[Point], path: Path) -> None:
    """Draw seconds and memory along each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [axis for axis in AXES if any(p.axis == axis for p in points)]
    figure, grid = pyplot.subplots(
        2, len(axes), figsize=(3.6 * len(axes), 6), squeeze=False, sharex="col", sharey="row"
    )
    for column, axis in enumerate(axes):
        for i, name in enumerate((*LOSSES, STEP)):
            own = sorted((p for p in points if p.axis == axis and p.what == name), key=lambda p: p.x)
            if own:
                style = {"color": f"C{i}", "label": name, "marker": "o", "ls": "--" if name == STEP else "-"}
                grid[0][column].plot([p.x for p in own], [p.seconds for p in own], **style)
                grid[1][column].plot([p.x for p in own], [max(p.mb, 1.0) for p in own], **style)
        ticks = sorted({p.x for p in points if p.axis == axis})
        for row, label in enumerate(("CPU s", "extra MB")):
            grid[row][column].set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=label)
            grid[row][column].set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=30)
            grid[row][column].minorticks_off()
    shown = {
        label: line for ax in grid[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(shown.values()), list(shown), loc="upper center", ncols=len(shown))
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure, print, write the tables and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["head", "step"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    points = head_points() if args.only != "step" else []
    points += step_points() if args.only != "head" else []
    stem = f"{date.today()}_growth"
    picture(points, RESULTS / f"{stem}.png")
    command = " ".join(["python benchmarks/growth.py", *sys.argv[1:]])
    size, course = Size(), Course()
    lines = [f"# Growth, {date.today()}", "", about_here(command, f"{args.threads} thread(s)"), ""]
    lines += [
        f"What is not varied: of the losses {size.tokens:,} tokens, V = {size.vocab:,}, K = {size.k}, width {WIDTH}; "
        f"of the whole step {course.batch} responses of {course.response} tokens, V = {course.vocab:,}, "
        f"K = {course.k}. Memory is without the gradient of the head, for the whole step without gradients and "
        "Adam's moments.",
        "",
    ]
    for axis in AXES:
        if any(p.axis == axis for p in points):
            lines += [*table(axis, points), ""]
    lines += [f"![growth]({stem}.png)"]
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
