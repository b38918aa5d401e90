"""Where the time of a run goes: seconds by phase as they are, then a trace of one collection."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from opd_lightning.clock import PhaseClock
from opd_lightning.data import OnPolicyData
from opd_lightning.errors import require


class Profile(L.Callback):
    """Times some optimizer steps, traces those of one more collection, writes both down and ends the run.

    Each window is of whole collections, so that generation, scoring and training have the parts that they
    have in a run: ``warmup_steps`` and ``steps`` are rounded up to them. Seconds are those of steps without
    a profiler, which would slow down what calls many small operators. The run's folder gets

    - ``profile.md``: seconds and tokens by phase, peak memory, the operators that took the most time;
    - ``trace.json.gz``: for chrome://tracing or ui.perfetto.dev, the phases as ranges.

    Args:
        warmup_steps: optimizer steps before anything is measured.
        steps: timed optimizer steps.
        operators: rows of the table of operators.

    Raises:
        ConfigError: a number below its least, or a run that is too short.
    """

    def __init__(self, warmup_steps: int, steps: int, operators: int) -> None:
        least = {"warmup_steps": (warmup_steps, 0), "steps": (steps, 1), "operators": (operators, 1)}
        for name, (value, low) in least.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
            require(
                whole, f"callbacks.profile.{name}", f"be a whole number of at least {low}", value, "raise it"
            )
        self.warmup_steps, self.steps, self.operators = warmup_steps, steps, operators
        self._window: _Window | None = None
        self._report = ""
        self._trace: _Trace | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that ends before the trace does, and begin where there is no warm-up."""
        begin, traced, end = self._plan(trainer)
        require(
            trainer.max_steps >= end,
            "trainer.max_steps",
            f"be at least {end} for a profile of {traced - begin} optimizer steps after {begin}, and a trace of "
            f"{end - traced}",
            trainer.max_steps,
            "raise it, or lower callbacks.profile.steps",
        )
        self._at(trainer, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Open and close the windows where an optimizer step has ended."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._at(trainer, trainer.global_step)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Close a trace that an error leaves open: a process has one profiler."""
        if self._trace is not None:
            self._trace.close()
            self._trace = None

    def _plan(self, trainer: L.Trainer) -> tuple[int, int, int]:
        """Return the steps at which timing begins, the trace begins, and everything ends."""
        each = trainer.datamodule.collector.steps_per_collection  # type: ignore[attr-defined]
        begin = -(-self.warmup_steps // each) * each
        traced = begin + -(-self.steps // each) * each
        return begin, traced, traced + each

    def _at(self, trainer: L.Trainer, step: int) -> None:
        begin, traced, end = self._plan(trainer)
        data: OnPolicyData = trainer.datamodule  # type: ignore[attr-defined]
        clock = data.collector.clock
        device = trainer.strategy.root_device
        if step == begin:
            self._window = _Window.open(clock, device)
        elif step == traced and self._window is not None:
            self._report = self._window.close(clock, device, traced - begin, data.peak_tflops)
            self._trace = _Trace(clock) if trainer.is_global_zero else None
        elif step == end and self._window is not None:
            trainer.should_stop = True
            if self._trace is not None:
                with clock.during("profile"):
                    self._write(trainer, self._trace)
                self._trace = None

    def _write(self, trainer: L.Trainer, trace: _Trace) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trace.close()
        trace.profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        operators = operator_table(list(trace.profiler.key_averages()), self.operators)
        (folder / "profile.md").write_text(f"{self._report}\n{operators}\n")
        print(f"{self._report}\nprofile.md and trace.json.gz (ui.perfetto.dev) are in {folder}", flush=True)


@dataclass(frozen=True)
class _Window:
    """The clock as it stood when timing began."""

    begun: float
    seconds: dict[str, float]
    tokens: dict[str, int]
    work: dict[str, float]

    @classmethod
    def open(cls, clock: PhaseClock, device: torch.device) -> _Window:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        clock.switch(clock.phase)  # charges what has passed
        return cls(time.perf_counter(), dict(clock.seconds), dict(clock.tokens), dict(clock.work))

    def close(self, clock: PhaseClock, device: torch.device, steps: int, peak: float | None) -> str:
        """Return the table of the phases since; ``peak`` is what utilisation is a share of, TFLOP/s."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock.switch(clock.phase)
        wall = time.perf_counter() - self.begun
        seconds = {p: s - self.seconds.get(p, 0.0) for p, s in clock.seconds.items()}
        tokens = {p: n - self.tokens.get(p, 0) for p, n in clock.tokens.items()}
        work = {p: w - self.work.get(p, 0.0) for p, w in clock.work.items()}
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        lines = [
            f"# Profile of {steps} optimizer steps",
            "",
            f"On {where}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
            f"{platform.python_version()}. Seconds are of this process, without the profiler.",
            "" if peak is None else f"Utilisation is of {peak:.4g} TFLOP/s.",
            "",
            *phase_table(seconds, tokens, work, wall, peak),
            "",
            *(f"Peak memory: {text}." for text in peak_memory(device)),
        ]
        return "\n".join(lines) + "\n"


class _Trace:
    """A running profiler, and the clock's phases as ranges in its trace."""

    def __init__(self, clock: PhaseClock) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities, acc_events=True)
        self._clock, self._open = clock, True
        self._range: record_function | None = None
        self.profiler.start()
        clock.listeners.append(self._show)

    def _show(self, phase: str | None) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None if phase is None else record_function(f"phase {phase}")
        if self._range is not None:
            self._range.__enter__()

    def close(self) -> None:
        """Stop; a second time nothing happens."""
        if self._open:
            self._open = False
            self._show(None)
            self._clock.listeners.remove(self._show)
            self.profiler.stop()


def phase_table(
    seconds: Mapping[str, float],
    tokens: Mapping[str, int],
    work: Mapping[str, float],
    wall: float,
    peak: float | None,
) -> list[str]:
    """Return the phases, the longest first, and what no phase accounts for, as rows of markdown.

    Model TFLOP/s and their share of ``peak`` are those of :mod:`opd_lightning.diagnostics.utilisation`.
    """

    def row(name: str, s: float, n: int, w: float) -> str:
        counted = f"{n} | {n / s:.0f}" if n else " | "
        rate = w / s / 1e12
        share = f"{rate / peak:.1%}" if w and peak else ""
        return f"| {name} | {s:.3f} | {s / wall:.1%} | {counted} | {f'{rate:.4g}' if w else ''} | {share} |"

    spent = {name: s for name, s in seconds.items() if s > 0.0}
    rest = max(wall - sum(spent.values()), 1e-9)
    return [
        "| phase | seconds | share | response tokens | tokens per second | model TFLOP/s | utilisation |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            row(name, s, tokens.get(name, 0), work.get(name, 0.0))
            for name, s in sorted(spent.items(), key=lambda item: -item[1])
        ),
        row("other: grading, cutting, logging", rest, 0, 0.0),
        row("all", wall, 0, sum(work.values())),
    ]


def peak_memory(device: torch.device) -> list[str]:
    """Return the most memory of this process so far and, of a GPU, that of the timed steps."""
    scale = 1024 if sys.platform != "darwin" else 1024**2
    found = [f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale:.0f} MB of this process so far"]
    if device.type == "cuda":
        found.append(f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MB on the device")
    return found


def operator_table(events: list[FunctionEventAvg], count: int) -> str:
    """Return the operators that took the most time of their own in the traced steps, as markdown.

    On a GPU in the order of device time. A phase's own row is what its code takes between operators; that of
    the training step is under ``Optimizer.step``, which Lightning has call it.
    """
    device = any(event.self_device_time_total > 0 for event in events)
    total = {
        "cpu": sum(e.self_cpu_time_total for e in events) or 1,
        "device": sum(e.self_device_time_total for e in events) or 1,
    }
    rows = [
        "Operators by time of their own, in one traced collection with its optimizer steps (the profiler adds "
        "to each call):",
        "",
        f"| operator | calls | CPU ms | CPU share |{' device ms | device share |' if device else ''}",
        f"|---|---:|---:|---:|{'---:|---:|' if device else ''}",
    ]
    key = "self_device_time_total" if device else "self_cpu_time_total"
    for event in sorted(events, key=lambda e: -getattr(e, key))[:count]:
        cpu, own = event.self_cpu_time_total, event.self_device_time_total
        more = f" {own / 1000:.1f} | {own / total['device']:.1%} |" if device else ""
        rows.append(f"| `{event.key}` | {event.count} | {cpu / 1000:.1f} | {cpu / total['cpu']:.1%} |{more}")
    return "\n".join(rows)
