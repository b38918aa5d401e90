"""Times and scratch memory of cases on a GPU, run in turn so that all meet the device alike."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

WARM_UP = 2
"""Turns that compile the kernels and fill the allocator, and do not count."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """``run`` is timed, with the Triton kernels or without; ``moved`` is the least it must read and write, bytes."""

    name: str
    run: Callable[[], object]
    kernels: bool = True
    moved: int = 0


@dataclass
class Found:
    """Milliseconds of each run, and the most bytes beside what was there before or is there after."""

    times: list[float]
    scratch: int = 0

    @property
    def ms(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")


def measure(cases: Sequence[Case], repeats: int) -> dict[str, Found]:
    """Run all cases in turn; one that has no room finds nothing."""
    found = {case.name: Found([]) for case in cases}
    for turn in range(repeats + WARM_UP):
        for case in cases:
            try:
                ms, scratch = once(case)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            if turn >= WARM_UP:
                found[case.name].times.append(ms)
                found[case.name].scratch = scratch
    return found


def once(case: Case) -> tuple[float, int]:
    """Return milliseconds and scratch bytes of one run."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with kernels(case.kernels):
        start.record()
        result = case.run()
        end.record()
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    del result
    return start.elapsed_time(end), torch.cuda.max_memory_allocated() - max(before, after)


@contextmanager
def kernels(on: bool) -> Iterator[None]:
    """Switch the package's Triton kernels on or off."""
    before = os.environ.pop("OPD_TRITON", None)
    os.environ["OPD_TRITON"] = "1" if on else "0"
    try:
        yield
    finally:
        del os.environ["OPD_TRITON"]
        if before is not None:
            os.environ["OPD_TRITON"] = before
