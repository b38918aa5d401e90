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

    def tokens_per_second(self) -> dict[str, float]:
        """Return response tokens per second of each phase that has seen both."""
        return {p: n / self.seconds[p] for p, n in self.tokens.items() if self.seconds.get(p, 0.0) > 0.0}
