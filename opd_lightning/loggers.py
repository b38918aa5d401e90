"""Lightning's loggers of metrics for runs that may be cut off and go on: what is logged is on the disk at once."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


@runtime_checkable
class Continues(Protocol):
    """A logger that can go on with what an earlier process of the run has logged."""

    def go_on(self, step: int) -> None:
        """Drop what was logged after ``step`` optimizer steps, and go on from there."""
        ...


class MetricsTable(CSVLogger):
    """``metrics.csv``: one row for each time that metrics are logged, on the disk when the call returns.

    The column ``step`` counts the optimizer steps before: a training step's row says what it began from.
    """

    def __init__(self, save_dir: str, name: str = "", version: str = "") -> None:
        super().__init__(save_dir=save_dir, name=name, version=version, flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the table."""
        if self._experiment is None:
            self._experiment = _Table(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def go_on(self, step: int) -> None:
        """Cut the table to the rows before ``step``."""
        self._experiment = _Table(log_dir=self.log_dir, keep=step)


class _Table(ExperimentWriter):
    """Writes the table; ``keep`` is the number of optimizer steps whose rows an earlier one leaves in it."""

    def __init__(self, log_dir: str, keep: int | None = None) -> None:
        self._keep = keep
        super().__init__(log_dir=log_dir)
        if keep is not None:
            self._cut(keep)

    def _cut(self, step: int) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < step]
            self.metrics_keys = list(reader.fieldnames or [])
        self._write(rows)

    def _check_log_dir_exists(self) -> None:
        """Remove the table of another run, which a new one takes the place of."""
        if self._keep is None and self._fs.isfile(self.metrics_file_path):
            self._fs.rm_file(self.metrics_file_path)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Write the whole table in place of the one that is there, which a kill would otherwise cut off."""
        beside = f"{self.metrics_file_path}.part"
        with open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self.metrics_file_path)


class Curves(TensorBoardLogger):
    """TensorBoard's events, flushed whenever metrics are logged."""

    def __init__(
        self, save_dir: str, name: str = "", version: str = "", default_hp_metric: bool = False
    ) -> None:
        super().__init__(save_dir=save_dir, name=name, version=version, default_hp_metric=default_hp_metric)

    @rank_zero_only
    def go_on(self, step: int) -> None:
        """Have TensorBoard forget what was logged from ``step`` on."""
        self._kwargs["purge_step"] = step

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write the metrics and have them on the disk."""
        super().log_metrics(metrics, step)
        self.experiment.flush()
