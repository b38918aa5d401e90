"""Callbacks that send their process signals, for the tests of stopping."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import IO, Any

import lightning as L


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Twice(L.Callback):
    """Sends SIGINT before the optimizer step after ``step``, and again ``within`` that step or the next checkpoint.

    A checkpoint is hit between two writes to its file.
    """

    def __init__(self, step: int, within: str) -> None:
        assert within in ("step", "checkpoint")
        self.step, self.within, self.sent = step, within, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the files of checkpoints."""
        files: Any = trainer.strategy.checkpoint_io
        opened = files.open
        files.open = lambda path: self._watched(opened(path), path)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Send the first."""
        if trainer.global_step == self.step and not self.sent:
            self.sent += 1
            _interrupt()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Send the second, in the middle of the step."""
        if self.within == "step" and self.sent == 1:
            self.sent += 1
            _interrupt()

    def _watched(self, file: IO[bytes], path: Path) -> IO[bytes]:
        write = file.write

        class Watched:
            """Sends the second when the file holds something."""

            def __enter__(watched) -> Watched:
                return watched

            def __exit__(watched, *_: object) -> None:
                file.close()

            def write(watched, data: Any) -> int:
                if self.sent == 1 and self.within == "checkpoint" and file.tell() > 100_000:
                    self.sent += 1
                    _interrupt()
                return write(data)

            def __getattr__(watched, name: str) -> Any:
                return getattr(file, name)

        return Watched()  # type: ignore[return-value]


class Evaluating(L.Callback):
    """Sends SIGTERM in the evaluation outside of training after ``step`` optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Send it."""
        if trainer.state.fn == "validate" and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
