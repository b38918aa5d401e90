"""A callback that kills its process, as kill -9 does, in the middle of a phase: for benchmarks/crashes.py and tests."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import IO, Any

import lightning as L

PHASES = ("generate", "score", "backward", "checkpoint")


def die() -> None:
    """Leave no chance to write, close or flush anything."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(L.Callback):
    """Kills this process in its ``count``-th ``phase``, ``part`` of the way through it.

    Generation and scoring are timed at their first time, and hit after ``part`` of that; where they have ended
    by then, the next time is taken. The backward pass is hit between the gradients of two weights, a checkpoint
    between two writes to its file.
    """

    def __init__(self, phase: str, count: int, part: float) -> None:
        assert phase in PHASES
        self.phase, self.count, self.part = phase, count, part
        self._entered, self._usual, self._since = 0, 0.05, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lie in wait."""
        if self.phase == "checkpoint":
            files: Any = trainer.strategy.checkpoint_io
            opened = files.open
            files.open = lambda path: self._cut_off(opened(path))
        elif self.phase == "backward":
            weights = [p for p in pl_module.parameters() if p.requires_grad]
            weights[int(self.part * len(weights))].register_post_accumulate_grad_hook(lambda _: self._count())
        else:
            self._clock = trainer.datamodule.collector.clock
            self._clock.listeners.append(self._listen)

    def _count(self) -> None:
        self._entered += 1
        if self._entered == self.count:
            die()

    def _listen(self, phase: str | None) -> None:
        if phase != self.phase:
            if self._since:
                self._usual = time.perf_counter() - self._since
            self._since = 0.0
            return
        self._entered, self._since = self._entered + 1, time.perf_counter()
        if self._entered >= self.count:
            threading.Thread(target=self._strike, args=(self._entered,), daemon=True).start()

    def _strike(self, entered: int) -> None:
        time.sleep(self.part * self._usual)
        if self._clock.phase == self.phase and self._entered == entered:
            die()

    def _cut_off(self, file: IO[bytes]) -> IO[bytes]:
        self._entered += 1
        if self._entered < self.count:
            return file
        write, left = file.write, [int(self.part * 3_000_000)]

        class Short:
            """Writes until there is no more time."""

            def __enter__(self) -> Short:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: Any) -> int:
                left[0] -= len(data)
                if left[0] < 0:
                    write(bytes(data)[: max(len(data) + left[0], 0)])
                    file.flush()
                    die()
                return write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Short()  # type: ignore[return-value]


def killed_in(folder: Path) -> str:
    """Return what a killed run left half done, for a log: the part of a checkpoint, or nothing."""
    parts = [f"{p.name} {p.stat().st_size}" for p in (folder / "checkpoints").glob(".*.part")]
    return ", ".join(parts)
