"""A function of no arguments that a GPU runs again from a recording of it: a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch

_PLAIN_RUNS = 2
"""Runs before the recording: they load the kernels, and a shape that is soon left is not worth one."""


@runtime_checkable
class Record(Protocol):
    """Makes of a function one that does the same each time to the same memory.

    The function reads and writes tensors that stay where they are, waits for no number from the device and
    decides nothing by one. Nothing else of a run may matter afterwards.
    """

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return what runs ``function``, recorded or not."""
        ...


def plainly(function: Callable[[], None]) -> Callable[[], None]:
    """Return ``function`` itself: where nothing can be recorded, it simply runs again."""
    return function


class CudaGraphs:
    """Records functions as CUDA graphs, which share the memory of what they compute on the way.

    One of them runs at a time. Where an attempt fails, a warning says why, once, and no other is made: what
    is not recorded yet runs as it is written.
    """

    def __init__(self, device: torch.device) -> None:
        """Record on ``device``, where all that the functions touch has to be."""
        self.device, self.failed = device, False
        # Held to the end: a pool of memory cannot be used again once none of its graphs is left, and may
        # hold the matrix library's workspace, which other graphs write to as well.
        self.first: Any = None

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return what records ``function`` at its third run and plays that from then on."""
        return _Recorded(self, function)

    def capture(self, function: Callable[[], None]) -> Any:
        """Record ``function`` without running it; return the graph, or None if that failed."""
        try:
            # A failed capture leaves its own stream current; the outer block puts the caller's back. What
            # other threads do meanwhile (a watchdog's queries, a loader's copies) must not spoil it.
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream()):
                graph = torch.cuda.CUDAGraph()
                pool = None if self.first is None else self.first.pool()
                with torch.cuda.graph(graph, pool, _stream(self.device), capture_error_mode="thread_local"):
                    function()
            self.first = self.first or graph
        except (RuntimeError, AssertionError) as error:
            self.failed = True
            reason = str(error).strip().splitlines()
            warnings.warn(
                f"no CUDA graph of a decoding step ({reason[0] if reason else type(error).__name__}), so each "
                "step is launched as without; engine.graphs=false asks for it at once",
                stacklevel=2,
            )
            return None
        return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream on which nothing but captures runs.

    The matrix library has a workspace for each stream, which goes when any graph of that stream goes. So the
    stream is not torch's own, which others record on, and no work outside of a graph may use it.
    """
    return torch.cuda.Stream(device)


class _Recorded:
    def __init__(self, graphs: CudaGraphs, function: Callable[[], None]) -> None:
        self.graphs, self.function = graphs, function
        self.runs = 0
        self.graph: Any = None

    def __call__(self) -> None:
        if self.graph is None and self.runs >= _PLAIN_RUNS and not self.graphs.failed:
            self.graph = self.graphs.capture(self.function)
        self.runs += 1
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()
