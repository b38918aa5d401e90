"""A callback that kills processes of a run, as kill -9 does, in the middle of a phase: for crashes.py and tests."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import IO, Any

import lightning as L

PHASES = ("generate", "score", "backward", "checkpoint")
TOGETHER = (*PHASES, "gather")
"""Of several processes: before one gives its part of a checkpoint, too."""
VICTIMS = ("1", "0", "all")


class KillAt(L.Callback):
    """Kills processes in the ``count``-th ``phase`` of one of them, ``part`` of the way through it.

    Generation and scoring are timed, and hit after ``part`` of the shortest so far; where they have ended
    by then, the next time is taken. The backward pass is hit between the gradients of two weights, a checkpoint
    between two writes to its file by the first process, and a gathering before the process gives its part of it.

    Args:
        phase: one of :data:`TOGETHER`.
        count: from 1.
        part: in [0, 1).
        victim: the rank that dies, of 0 and 1, or ``all``.
        note: file that is told the time, of processes that live on.
    """

    def __init__(
        self, phase: str, count: int, part: float, victim: str = "0", note: str | None = None
    ) -> None:
        assert phase in TOGETHER
        assert str(victim) in VICTIMS
        self.phase, self.count, self.part, self.victim, self.note = phase, count, part, str(victim), note
        self._entered, self._usual, self._since, self._done = 0, math.inf, 0.0, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lie in wait, in the process whose phase it is."""
        self._rank = trainer.global_rank
        children = [process.pid for process in getattr(trainer.strategy.launcher, "procs", ())]
        self._others = children if self._rank == 0 else [os.getppid()]
        if self._rank != (1 if self.victim == "1" and self.phase != "checkpoint" else 0):
            return
        data: Any = trainer.datamodule
        if self.phase == "checkpoint":
            files: Any = trainer.strategy.checkpoint_io
            opened = files.open
            files.open = lambda path: self._cut_off(opened(path))
        elif self.phase == "gather":
            given = data.state_dict
            data.state_dict = lambda: self._count() or given()
        elif self.phase == "backward":
            weights = [p for p in pl_module.parameters() if p.requires_grad]
            weights[int(self.part * len(weights))].register_post_accumulate_grad_hook(lambda _: self._count())
        else:
            self._clock = data.collector.clock
            self._clock.listeners.append(self._listen)

    def _die(self) -> None:
        """Leave the victims no chance to write, close or flush anything."""
        self._done = True
        if self.note is not None:
            Path(self.note).write_text(str(time.time()))
        mine = self.victim in ("all", str(self._rank))
        for process in self._others if self.victim == "all" or not mine else ():
            os.kill(process, signal.SIGKILL)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)

    def _count(self) -> None:
        self._entered += 1
        if self._entered == self.count:
            self._die()

    def _listen(self, phase: str | None) -> None:
        if phase != self.phase:
            if self._since:
                self._usual = min(self._usual, time.perf_counter() - self._since)
            self._since = 0.0
            return
        self._entered, self._since = self._entered + 1, time.perf_counter()
        if self._entered >= self.count:
            threading.Thread(target=self._strike, args=(self._entered,), daemon=True).start()

    def _strike(self, entered: int) -> None:
        time.sleep(self.part * min(self._usual, 0.05 if entered == 1 else math.inf))
        if self._clock.phase == self.phase and self._entered == entered:
            self._die()

    def _cut_off(self, file: IO[bytes]) -> IO[bytes]:
        self._entered += 1
        if self._entered < self.count or self._done:
            return file
        write, left, die = file.write, [int(self.part * 3_000_000)], self._die

        class Short:
            """Writes until there is no more time; to the end where another process is the victim."""

            def __enter__(self) -> Short:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: Any) -> int:
                before = left[0]
                left[0] -= len(data)
                if left[0] < 0 <= before:
                    write(bytes(data)[:before])
                    file.flush()
                    die()
                    return before + write(bytes(data)[before:])
                return write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Short()  # type: ignore[return-value]


def killed_in(folder: Path) -> str:
    """Return what a killed run left half done, for a log: the part of a checkpoint, or nothing."""
    parts = [f"{p.name} {p.stat().st_size}" for p in (folder / "checkpoints").glob(".*.part")]
    return ", ".join(parts)
