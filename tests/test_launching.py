"""What a process says of another one that is lost; two processes are in ``distributed/test_lost_process.py``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from opd_lightning.commands import _code
from opd_lightning.errors import ConfigError, ProcessLost, RunStopped
from opd_lightning.launching import _lost, _of_a_connection


def test_what_is_lost_has_a_name(monkeypatch):
    ended = [
        subprocess.Popen([sys.executable, "-c", code]) for code in ("", "import os; os.kill(os.getpid(), 9)")
    ]
    for process in ended:
        process.wait()
    assert _lost(ended[:1]) is None
    assert _lost(ended) == "process 2 killed by SIGKILL"
    monkeypatch.setenv("OPD_LIGHTNING_FIRST_PROCESS", str(ended[0].pid))
    assert _lost([]) == "the first process gone"
    monkeypatch.setenv("OPD_LIGHTNING_FIRST_PROCESS", str(os.getppid()))
    assert _lost([]) is None


def test_a_signal_without_a_name_has_its_number():
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.kill(os.getpid(), {signal.SIGRTMIN + 6})"]
    )
    process.wait()
    assert _lost([process]) == f"process 1 killed by signal {signal.SIGRTMIN + 6}"


@pytest.mark.parametrize(
    ("rank", "error", "code"),
    [
        ("0", RunStopped, 2),
        ("1", RunStopped, 0),
        ("1", ConfigError, 2),
        ("0", ProcessLost, 75),
        ("1", ProcessLost, 75),
    ],
)
def test_where_all_stop_the_first_one_s_exit_code_is_the_run_s(rank, error, code, monkeypatch):
    """Another one that leaves earlier, by another code than 0, would be taken for lost."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert _code(error("stopped")) == code


def test_other_errors_are_not_of_a_connection():
    said = "[/build/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1. Typically\nmore"
    assert _of_a_connection(RuntimeError(said)) == said.removesuffix(". Typically\nmore")
    assert _of_a_connection(RuntimeError("shapes differ")) is None
    assert _of_a_connection(ValueError("gloo/")) is None
    assert _of_a_connection(torch.distributed.DistNetworkError("gone")) == "gone"
