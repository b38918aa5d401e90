"""What a process says of another one that is lost; two processes are in ``distributed/test_lost_process.py``."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

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


def test_other_errors_are_not_of_a_connection():
    said = "[/build/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1. Typically\nmore"
    assert _of_a_connection(RuntimeError(said)) == said.removesuffix(". Typically\nmore")
    assert _of_a_connection(RuntimeError("shapes differ")) is None
    assert _of_a_connection(ValueError("gloo/")) is None
    assert _of_a_connection(torch.distributed.DistNetworkError("gone")) == "gone"
