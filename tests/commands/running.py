"""The commands, run in this process or in one of their own."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from opd_lightning import choose_horizon, evaluate, plan, preflight, serve_teacher, toy_gamma, train

MAINS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "plan": plan.main,
    "toy_gamma": toy_gamma.main,
    "choose_horizon": choose_horizon.main,
    "serve_teacher": serve_teacher.main,
    "preflight": preflight.main,
}


@dataclass(frozen=True)
class Finished:
    """A command that ended: its exit code, what it printed, and the folder that it was given for its results."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def sentence(self) -> str:
        """The one line of a refusal."""
        assert self.code == 2, self.err or self.out
        assert "Traceback" not in self.out + self.err
        (line,) = self.err.strip().splitlines()
        return line

    @property
    def summary(self) -> dict[str, Any]:
        """What a training run left in ``summary.json``, or an evaluation in ``evaluation.json``."""
        assert self.code == 0, self.err
        (path,) = [p for p in self.folder.iterdir() if p.name in ("summary.json", "evaluation.json")]
        return json.loads(path.read_text())

    @property
    def losses(self) -> list[float]:
        """The loss of every optimizer step."""
        return losses(self.folder)


def losses(folder: Path) -> list[float]:
    """Return the loss of every optimizer step of the run in ``folder``."""
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def here(command: str, *arguments: str, folder: Path) -> Finished:
    """Run ``python -m opd_lightning.<command>`` inside this process, with ``folder`` for its results."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with _as_before(), pytest.MonkeyPatch.context() as patch:
        own = any(word.startswith("hydra.run.dir=") for word in arguments)
        patch.setattr(sys, "argv", [command, *arguments, *([] if own else [f"hydra.run.dir={folder}"])])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                MAINS[command]()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
    return Finished(code, out.getvalue(), err.getvalue(), folder)


def start(command: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Begin ``python -m opd_lightning.<command>`` in a process and a folder of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"opd_lightning.{command}", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], folder: Path) -> Finished:
    """Wait for a command in its own process."""
    out, err = process.communicate()
    return Finished(process.returncode, out, err, folder)


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Undo what a command leaves in a process: log handlers, Hydra's state, filters of warnings."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        GlobalHydra.instance().clear()
        root.handlers[:], root.level = handlers, level
