"""The evaluations of a run, by optimizer step."""

from __future__ import annotations

import lightning as L


class EvaluationHistory(L.Callback):
    """Remembers every evaluation and prints it in one line.

    ``at[step]`` holds the ``eval/*`` metrics after ``step`` optimizer steps.
    """

    def __init__(self) -> None:
        self.at: dict[int, dict[str, float]] = {}

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
