"""A scoring server in a thread of this process, for real clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import uvicorn
from commands.own import shipped_tokenizer
from tiny import tiny_model
from transformers import PreTrainedModel

from opd_lightning.serving.app import Service
from opd_lightning.serving.bench import Bench
from opd_lightning.serving.identity import ServerInfo, TokenizerIdentity, weights_digest

VOCAB = 448
"""Of the shipped tokenizer, rounded up."""


def a_bench(model: PreTrainedModel | None = None, tokens: int = 10_000, **limits: Any) -> Bench:
    """Return a tiny random teacher with the shipped tokenizer's ids."""
    model = (model or tiny_model(vocab=VOCAB)).eval().requires_grad_(False)
    info = ServerInfo(
        version="1",
        path="tiny",
        dtype="float32",
        model=weights_digest(model),
        vocab=VOCAB,
        context=64,
        most_ids=32,
        most_bytes=2**20,
        tokenizer=TokenizerIdentity.of(shipped_tokenizer()),
    )
    return Bench(model=model, info=replace(info, **limits), scratch=2**20, layout="auto", tokens=tokens)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(
    bench: Bench, *, held: int = 2**24, token: str | None = None, port: int = 0
) -> Iterator[tuple[str, Service]]:
    """Serve ``bench`` on loopback; yield the address and the service."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    service = Service.of(bench, held, token)
    server = uvicorn.Server(uvicorn.Config(service.application(), log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
