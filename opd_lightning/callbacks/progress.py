"""Lightning's rich progress bar, with the phase that runs and the tokens per second of each."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

_SHORT = {"generate": "gen", "score": "score", "train": "train"}


class PhaseProgressBar(RichProgressBar):
    """Shows optimizer steps done, the running phase, and response tokens per second by phase.

    Args:
        refresh_rate: batches between refreshes of the bar; 0 turns it off.
    """

    def __init__(self, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._phase = "starting"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the phases of the collecting half."""
        clock = self._clock(trainer)
        if clock is not None and self._show not in clock.listeners:
            clock.listeners.append(self._show)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self._phase:<8}"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return Lightning's metrics without the version number, and the speeds."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        clock = self._clock(trainer)
        rates = {} if clock is None else clock.tokens_per_second()
        speeds = {_SHORT[name]: f"{rate / 1000:.1f}k tok/s" for name, rate in rates.items() if name in _SHORT}
        return metrics | speeds

    def _show(self, phase: str) -> None:
        self._phase = phase
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=self._get_train_description(0))
            self.refresh()

    @staticmethod
    def _clock(trainer: L.Trainer) -> Any:
        collector = getattr(getattr(trainer, "datamodule", None), "collector", None)
        return getattr(collector, "clock", None)
