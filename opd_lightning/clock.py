"""Seconds and tokens by phase of a run: what a progress bar shows and a summary reports."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator


class PhaseClock:
    """Charges every moment to exactly one phase; a phase entered inside another interrupts it.

    ``listeners`` are called with the name of each phase as it begins.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)
        self.listeners: list[Callable[[str], None]] = []
        self.phase: str | None = None
        self._since = 0.0
        self._lap: tuple[dict[str, float], dict[str, int]] = ({}, {})

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

    def tokens_per_second(self) -> dict[str, float]:
        """Return response tokens per second of each phase that has seen both."""
        return {p: n / self.seconds[p] for p, n in self.tokens.items() if self.seconds.get(p, 0.0) > 0.0}

    def lap(self) -> dict[str, float]:
        """Return ``time/<phase>_seconds`` and ``time/<phase>_tokens_per_second`` since the last lap."""
        seconds, tokens = dict(self.seconds), dict(self.tokens)
        spent = {p: s - self._lap[0].get(p, 0.0) for p, s in seconds.items()}
        done = {p: n - self._lap[1].get(p, 0) for p, n in tokens.items()}
        self._lap = (seconds, tokens)
        lap = {f"time/{p}_seconds": s for p, s in spent.items() if s > 0.0}
        speeds = {p: n / spent[p] for p, n in done.items() if spent.get(p, 0.0) > 0.0}
        return lap | {f"time/{p}_tokens_per_second": rate for p, rate in speeds.items()}
