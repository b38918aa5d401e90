"""Sample responses as text, in TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from opd_lightning.errors import require
from opd_lightning.types import Graded


class SampleResponses(L.Callback):
    """Writes a few of the student's latest responses with their grades.

    Args:
        every_steps: optimizer steps between samples.
        count: responses each time.
    """

    def __init__(self, every_steps: int, count: int) -> None:
        require(every_steps >= 1, "callbacks.samples.every_steps", "be at least 1", every_steps, "use 40")
        self.every_steps = every_steps
        self.count = count
        self._last = -1

    def state_dict(self) -> dict[str, Any]:
        """Return when samples were written last."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._last = state_dict["last"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the samples of the last collection."""
        # That of the step that ended, as its metrics have: what a continued run keeps lies before its checkpoint.
        step, report = trainer.global_step - 1, getattr(getattr(trainer, "datamodule", None), "report", None)
        due = step // self.every_steps > self._last // self.every_steps if self._last >= 0 else True
        if report is None or not due or not trainer.is_global_zero:
            return
        self._last = step
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("rollout/samples", transcript(report.graded, self.count), step)


def transcript(graded: Graded, count: int) -> str:
    """Return the first ``count`` responses as markdown, each under its prompt with its grade."""
    blocks = []
    for row in range(min(count, len(graded.texts))):
        correct = float(graded.correct[row])
        verdict = "ungraded" if correct != correct else ("right" if correct > 0.5 else "wrong")
        cut = ", cut by the budget" if bool(graded.truncated[row]) else ""
        text = graded.texts[row].strip().replace("```", "'''")
        caption = f"_{verdict}, {int(graded.lengths[row])} tokens{cut}_"
        blocks.append(f"**{graded.prompts[row].strip()}**\n\n```\n{text}\n```\n\n{caption}")
    return "\n\n---\n\n".join(blocks)
