"""The processes of a run on one machine: where one is lost the others end too, soon and with a sentence.

By itself a process waits for a lost one in its next collective, with NCCL for ten minutes; and Lightning's own
observer answers a lost child by SIGKILL to the first process, which can then say nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from opd_lightning.errors import ProcessLost, RunStopped, Stopped

GRACE = 10.0
"""Seconds in which the processes beside a lost one may end by themselves: of an error in a collective, most often."""

_FIRST = "OPD_LIGHTNING_FIRST_PROCESS"
"""Environment variable by which the first process of a machine tells those that it starts its number."""


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes as Lightning does, and leaves watching them to :func:`together`."""

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Start them once, and call ``function``."""
        if not self.cluster_environment.creates_processes_externally:
            self.cluster_environment.validate_settings(
                num_devices=self.num_processes, num_nodes=self.num_nodes
            )
            os.environ[_FIRST] = str(os.getpid())
            # Lightning then reads in the environment that they are there, and sets no observer on them.
            self._call_children_scripts()
        return super().launch(function, *args, **kwargs)


@contextlib.contextmanager
def together(trainer: L.Trainer, folder: Path) -> Iterator[None]:
    """Run a block of all processes of a run; where one of them is lost it ends in all of them.

    At once where a collective finds it out; otherwise :data:`GRACE` seconds later, by a thread that ends this process
    in the middle of what it does. An error of the first process's own ends those that it has started.

    Raises:
        ProcessLost: another process of the run is gone, or does not answer.
    """
    if trainer.world_size == 1:
        yield
        return
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        trainer.strategy._launcher = launcher
    over, started = threading.Event(), partial(_started, launcher)
    threading.Thread(target=_watch, args=(started, folder, over), daemon=True).start()
    try:
        yield
    except (Stopped, RunStopped):
        raise  # in all of them
    except BaseException as error:
        over.set()
        said = _of_a_connection(error)
        what = None if said is None else _lost_within(5.0, started) or f"no answer from one of them ({said})"
        _end(started())
        if what is not None:
            raise ProcessLost(_sentence(what, folder)) from error
        raise
    finally:
        over.set()


Started = Callable[[], "Sequence[subprocess.Popen[bytes]]"]
"""The processes that this one has started so far."""


def _started(launcher: object) -> Sequence[subprocess.Popen[bytes]]:
    return launcher.procs if isinstance(launcher, Launcher) else ()


def _watch(started: Started, folder: Path, over: threading.Event) -> None:
    while not over.wait(0.5):
        what = _lost(started())
        if what is not None and not over.wait(GRACE):
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
                print(f"error: {_sentence(what, folder)}", file=sys.stderr, flush=True)
            _end(started(), seconds=0.0)
            os._exit(ProcessLost.code)


def _lost(started: Sequence[subprocess.Popen[bytes]]) -> str | None:
    """Return which process of this machine is gone, None for none: a child of the first, or to a child the first."""
    for number, process in enumerate(started, 1):
        code = process.poll()
        if code:
            how = f"killed by {_name(-code)}" if code < 0 else f"ended with exit code {code}"
            return f"process {number} {how}"
    first = int(os.environ.get(_FIRST, os.getpid()))
    return None if first in (os.getpid(), os.getppid()) else "the first process gone"


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals has no name
        return f"signal {number}"


def _lost_within(seconds: float, started: Started) -> str | None:
    end = time.monotonic() + seconds
    while (what := _lost(started())) is None and time.monotonic() < end:
        time.sleep(0.05)
    return what


def _end(started: Sequence[subprocess.Popen[bytes]], seconds: float = GRACE) -> None:
    """Kill what has not ended by itself after some seconds."""
    end = time.monotonic() + seconds
    for process in started:
        try:
            process.wait(max(end - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()


def _of_a_connection(error: BaseException | None) -> str | None:
    """Return what a backend says of processes that do not answer, None for an error of another kind."""
    if not isinstance(error, RuntimeError):
        return None
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo/" in str(error):
            return str(error).strip().splitlines()[0].partition(". ")[0]  # advice follows
        error = error.__cause__ or error.__context__
    return None


def _sentence(what: str, folder: Path) -> str:
    return (
        f"the processes of a run must all stay alive, got {what}; look for what it said or who killed it, and the "
        f"same command with resume={folder} goes on from the last checkpoint"
    )
