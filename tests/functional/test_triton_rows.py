"""The head's Triton kernels without a GPU: run by the interpreter, and compiled for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd_lightning.functional.head import triton_rows

HERE = Path(__file__).parent


def in_a_process_of_its_own(*command, **variables):
    """What runs here sees none of the caller's Triton settings, and leaves the caller none."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "OPD_"))}
    done = subprocess.run(
        [sys.executable, *command], env=kept | variables, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    said = in_a_process_of_its_own(
        "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "interpreted_kernels.py"), TRITON_INTERPRET="1"
    )
    assert " passed" in said
    assert "skipped" not in said


def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes what a compiler refuses; the compiler needs no GPU."""
    pytest.importorskip("triton")
    said = in_a_process_of_its_own(str(HERE / "compiled_kernels.py"), TRITON_CACHE_DIR=str(tmp_path))
    assert said.split() == sorted(said.split())
    assert len(said.split()) == 8


def test_cpu_tensors_are_left_to_torch():
    assert "TRITON_INTERPRET" not in os.environ
    assert not triton_rows.available(torch.zeros(1))


def test_nothing_imports_triton_before_it_is_used():
    code = "import sys, opd_lightning.functional.head.triton_gather; print('triton' in sys.modules)"
    assert in_a_process_of_its_own("-c", code).strip() == "False"
