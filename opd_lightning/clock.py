"""Seconds, tokens and arithmetic by phase of a run: what a progress bar shows and a summary reports."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any


class PhaseClock:
    """Charges every moment to exactly one phase; a phase entered inside another interrupts it.

    ``listeners`` are called with the name of each phase as it begins.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)
        self.work: dict[str, float] = defaultdict(float)
        self.listeners: list[Callable[[str], None]] = []
        self.phase: str | None = None
        self._since = 0.0
        self._lap: tuple[dict[str, float], dict[str, int], dict[str, float]] = ({}, {}, {})

    def state_dict(self) -> dict[str, Any]:
        """Return what was charged so far, as a checkpoint holds it."""
        charged = [dict(self.seconds), dict(self.tokens), dict(self.work)]
        return {"charged": charged, "lap": [dict(counts) for counts in self._lap]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what an earlier process of the run was charged with."""
        charged: tuple[dict[str, Any], ...] = (self.seconds, self.tokens, self.work)
        for mine, theirs in zip(charged, state["charged"], strict=True):
            mine.update(theirs)
        seconds, tokens, work = state["lap"]
        self._lap = (seconds, tokens, work)

    def switch(self, phase: str | None) -> str | None:
        """Begin ``phase`` (None: none), end the one before and return it."""
        now, before = time.perf_counter(), self.phase
        if before is not None:
            self.seconds[before] += now - self._since
        self.phase, self._since = phase, now
        if phase is not None and phase != before:
            for listener in self.listeners:
                listener(phase)
        return before

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Charge the block to ``phase`` and go back to the phase around it."""
        before = self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def count(self, tokens: int) -> None:
        """Add response tokens to the phase that runs."""
        if self.phase is not None:
            self.tokens[self.phase] += tokens

    def charge(self, operations: float) -> None:
        """Add floating-point operations of a model to the phase that runs."""
        if self.phase is not None:
            self.work[self.phase] += operations

    def tokens_per_second(self) -> dict[str, float]:
        """Return response tokens per second of each phase that has seen both."""
        return {p: n / self.seconds[p] for p, n in self.tokens.items() if self.seconds.get(p, 0.0) > 0.0}

    def tflops(self) -> dict[str, float]:
        """Return model TFLOP/s of each phase that has seen both, and of ``all`` that it has seen."""
        return _tflops(self.work, self.seconds)

    def lap(self, peak: float | None = None) -> dict[str, float]:
        """Return what there is since the last lap, seconds and rates by phase.

        ``time/<phase>_seconds``, ``time/<phase>_tokens_per_second`` and, where models are metered,
        ``time/<phase>_tflops``; ``time/model_tflops`` is all phases' operations over all phases' seconds,
        ``time/mfu`` its share of ``peak``, in TFLOP/s.
        """
        before, self._lap = self._lap, (dict(self.seconds), dict(self.tokens), dict(self.work))
        spent = {p: s - before[0].get(p, 0.0) for p, s in self.seconds.items()}
        done = {p: n - before[1].get(p, 0) for p, n in self.tokens.items()}
        worked = {p: w - before[2].get(p, 0.0) for p, w in self.work.items()}
        lap = {f"time/{p}_seconds": s for p, s in spent.items() if s > 0.0}
        speeds = {p: n / spent[p] for p, n in done.items() if spent.get(p, 0.0) > 0.0}
        lap |= {f"time/{p}_tokens_per_second": rate for p, rate in speeds.items()}
        rates = _tflops(worked, spent)
        lap |= {f"time/{'model' if p == 'all' else p}_tflops": rate for p, rate in rates.items()}
        return lap | ({"time/mfu": rates["all"] / peak} if rates and peak else {})


def _tflops(work: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    rates = {p: w / seconds[p] / 1e12 for p, w in work.items() if w > 0.0 and seconds.get(p, 0.0) > 0.0}
    return rates | {"all": sum(work.values()) / sum(seconds.values()) / 1e12} if rates else {}
