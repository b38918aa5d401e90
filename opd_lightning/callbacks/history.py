"""The evaluations of a run, by optimizer step."""

from __future__ import annotations

from typing import Any

import lightning as L


class EvaluationHistory(L.Callback):
    """Remembers every evaluation and prints it in one line.

    ``at[step]`` holds the ``eval/*`` metrics after ``step`` optimizer steps. ``every`` is the number of steps
    between evaluations, None for none during training.
    """

    def __init__(self, every: int | None = None) -> None:
        self.at: dict[int, dict[str, float]] = {}
        self.every = every
        self._goes_on = False

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluations so far."""
        return {"at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the evaluations of an earlier process of the run."""
        self.at = {int(step): dict(metrics) for step, metrics in state_dict["at"].items()}
        self._goes_on = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log or make up the evaluation at the checkpoint's step: it comes right after the checkpoint."""
        step, goes_on, self._goes_on = trainer.global_step, self._goes_on, False
        if not goes_on:
            return
        if step in self.at:
            self._log_again(trainer)
        elif self.every is not None and step % self.every == 0:
            # As Lightning's training loop does it.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the evaluation at the checkpoint's step where no training was left to begin."""
        if self._goes_on and trainer.global_step in self.at:
            self._log_again(trainer)
        self._goes_on = False

    def _log_again(self, trainer: L.Trainer) -> None:
        """Log what the cut of the logs at the checkpoint's step has taken away."""
        for logger in trainer.loggers:
            logger.log_metrics(self.at[trainer.global_step], step=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the evaluation that ended."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("eval/")}
        if not metrics:
            return
        self.at[trainer.global_step] = metrics
        if trainer.is_global_zero:
            print(f"step {trainer.global_step}: {evaluation_line(metrics)}", flush=True)


def evaluation_line(metrics: dict[str, float]) -> str:
    """Return the metrics of an evaluation as one line of text."""
    shown = {
        "accuracy": "eval/accuracy",
        "sampled": "eval/accuracy_sampled",
        "length": "eval/length",
        "truncated": "eval/truncation",
    }
    parts = []
    for label, key in shown.items():
        if key in metrics:
            value = metrics[key]
            parts.append(f"{label} {value:.1f}" if label == "length" else f"{label} {value:.1%}")
    return ", ".join(parts) or "nothing graded"
