"""Checkpoints that a run can go on from: the latest few and the best."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.errors import Hurried, RunStopped, Stopped


class _InItsFolder(ModelCheckpoint):
    """Knows its files again where the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which files there are, by their names in the folder as it is called now."""
        before, now = str(state_dict["dirpath"]), str(self.dirpath)

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {moved(key): inner for key, inner in value.items()}
            return value.replace(before, now, 1) if isinstance(value, str) else value

        super().load_state_dict({name: moved(value) for name, value in state_dict.items()})


class LatestCheckpoints(_InItsFolder):
    """Keeps the run's latest checkpoints, that of its end and that of an exception included.

    Args:
        dirpath: folder of the files, ``step=<optimizer steps>.ckpt``.
        every_steps: optimizer steps between them.
        keep: how many are kept; the one before the latest is there in case that a disk breaks a file.
    """

    def __init__(self, dirpath: str, every_steps: int, keep: int) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_steps,
            save_on_exception=True,
            enable_version_counter=False,
        )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save what the run has, unless the exception came within an optimizer step or leaves no time for it.

        Of several processes only where they stop together: one that fails alone would wait for the others, which
        wait for it.
        """
        together = trainer.world_size == 1 or isinstance(exception, Stopped | RunStopped)
        whole = not getattr(pl_module, "stepping", False) and not isinstance(exception, Hurried)
        if together and whole and trainer.state.fn == "fit" and trainer.global_step:
            self._save_now(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end."""
        self._save_now(trainer)

    def _save_now(self, trainer: L.Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class BestCheckpoint(_InItsFolder):
    """Keeps the checkpoints with the largest value of a metric of the evaluations.

    Args:
        dirpath: folder of the files, ``best-step=<optimizer steps>.ckpt``.
        metric: one of ``eval/*``; where no evaluation has it, as without a grader, none is kept.
        keep: how many.
    """

    def __init__(self, dirpath: str, metric: str, keep: int) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best-{step}",
            monitor=metric,
            mode="max",
            save_top_k=keep,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after an evaluation that is among the best."""
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    def on_train_batch_end(self, *args: Any) -> None:
        """Do nothing: there are evaluations for it."""
