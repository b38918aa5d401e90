"""Stopping a run so that it can go on: on a signal, or after a time."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import lightning as L
import torch

from opd_lightning.errors import Hurried, Stopped, require

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopWithCheckpoint(L.Callback):
    """Ends training behind an optimizer step after SIGTERM, SIGUSR1, Ctrl-C or a time limit.

    The checkpoint of that step is written, and the command leaves with exit code 128 + the signal's number, or
    124 after a time limit. In the evaluations before and after training a signal ends it behind a batch, and nothing
    is written. One process alone stops between generation and scoring too. Ctrl-C after any of them
    ends the run where it is, within the writing of a checkpoint too, which is then left out; the next one kills.
    Another second signal of the same kind does what it would have done without.

    Args:
        after_minutes: wall-clock limit of training in this process; None for none. Choose it below a queue's by
            what a collection with its steps takes.

    Raises:
        ConfigError: a limit that is not above 0.
    """

    def __init__(self, after_minutes: float | None) -> None:
        require(
            after_minutes is None or (isinstance(after_minutes, int | float) and after_minutes > 0),
            "callbacks.stopping.after_minutes",
            "be above 0",
            after_minutes,
            "use null for no limit",
        )
        self.after_minutes = after_minutes
        self._begun = time.monotonic()
        self._asked: int = 0
        self._before: dict[int, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to the signals, in place of Lightning, which would end a process at once or hang the others."""
        self._step = trainer.global_step
        self._listen()
        clock = getattr(getattr(getattr(trainer, "datamodule", None), "collector", None), "clock", None)
        if clock is not None and trainer.world_size == 1:
            clock.listeners.append(self._between_phases)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen in the evaluations before and after training too."""
        if trainer.state.fn == "validate" and not self._before:
            self._listen()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop behind a batch of those, of which all processes have equally many; the time limit is of training."""
        if trainer.state.fn == "validate":
            self._stop(_largest(trainer, self._asked))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back behind those."""
        if trainer.state.fn == "validate":
            self.teardown(trainer, pl_module, "validate")

    def _listen(self) -> None:
        try:
            self._before = {s: signal.signal(s, self._ask) for s in _SIGNALS}
        except ValueError:  # not the main thread: a notebook's or a test's own business
            self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            raise Hurried("by a second signal, SIGINT, without waiting for a checkpoint", 128 + number)
        self._asked = number
        if number != signal.SIGINT:
            signal.signal(number, self._before.get(number) or signal.SIG_DFL)

    def _between_phases(self, phase: str | None) -> None:
        if phase in ("generate", "score", "probe"):
            self._stop(self._wish())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop behind a whole optimizer step, all processes at the same one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        wish = _largest(trainer, self._wish())
        if trainer.global_step < trainer.max_steps:
            self._stop(wish)

    def _wish(self) -> int:
        """Return the number of the signal that came, :data:`_LATE` past the time limit, 0 for neither."""
        limit = self.after_minutes
        late = limit is not None and time.monotonic() - self._begun > 60 * limit
        return self._asked or (_LATE if late else 0)

    def _stop(self, wish: int) -> None:
        if wish == _LATE:
            raise Stopped(f"after its {self.after_minutes} minutes", 124)
        if wish:
            raise Stopped(f"by {signal.Signals(wish).name}", 128 + wish)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}


def _largest(trainer: L.Trainer, wish: int) -> int:
    """Return the largest of all processes' wishes."""
    if trainer.world_size == 1:
        return wish
    wishes = torch.tensor([wish], device=trainer.strategy.root_device)
    torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX)
    return int(wishes)


_LATE = 10_000
"""Stands for the time limit among the numbers of signals."""
