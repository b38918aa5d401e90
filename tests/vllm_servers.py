"""A vLLM server of the tests' own, on loopback and a CPU."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STUDENT_FLAGS = (
    *("--skip-tokenizer-init", "--enable-scale-out", "--generation-config", "vllm"),
    *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
    *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"),
)
"""Those of conf/engine/vllm_server.yaml."""


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def vllm_serving(model: Path | str, port: int, *flags: str, log: Path) -> Iterator[int]:
    """Serve ``model`` inside the block; the server goes with its workers. It is the leader of their session."""
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--max-num-seqs", "64", "--enforce-eager", *flags]
    with log.open("w") as lines:
        process = subprocess.Popen(
            command,
            stdout=lines,
            stderr=lines,
            start_new_session=True,
            env=os.environ | settings | {"HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"},
        )
    try:
        while not _healthy(port):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except (
            subprocess.TimeoutExpired
        ):  # in the middle of a sending vLLM may wait for its worker without end
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
