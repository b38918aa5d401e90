"""``python -m opd_lightning.serve_teacher teacher.path=PATH``: a teacher that runs score with over HTTP."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
from types import FrameType

import torch
from omegaconf import DictConfig

from opd_lightning.commands import build, command, quiet, refuse_unknown_keys
from opd_lightning.errors import ConfigError, require
from opd_lightning.layout import check_layout
from opd_lightning.loading import check_scratch, load_scorer
from opd_lightning.models import check_dtype, load_tokenizer, vocabulary_width
from opd_lightning.serving.bench import Bench
from opd_lightning.serving.client import read_token
from opd_lightning.serving.identity import ServerInfo, TokenizerIdentity, weights_digest
from opd_lightning.serving.wire import VERSION
from opd_lightning.teacher.local import LocalTeacher
from opd_lightning.teacher.quantized import configured

KEYS = {
    *("teacher", "head_scratch_mb", "layout", "accelerator", "host", "port", "token_env"),
    *("tokens_per_batch", "max_ids", "max_body_mb", "max_held_mb", "context", "grace_s"),
}
_WHOLE = {
    "tokens_per_batch": "use 16384",
    "max_ids": "use 1024",
    "max_body_mb": "use 64",
    "max_held_mb": "use 512",
    "grace_s": "use 30",
}


def check(config: DictConfig) -> str | None:
    """Refuse a setting out of its range, before a model is loaded, and return the token.

    Raises:
        ConfigError: there is one; or the address can be reached from elsewhere and no token is set.
    """
    refuse_unknown_keys(config, KEYS)
    for name, remedy in _WHOLE.items():
        require(_whole(config[name]), name, "be a whole number of at least 1", config[name], remedy)
    longest = config.context
    require(longest is None or _whole(longest), "context", "be null or at least 1", longest, "use null")
    held, body = config.max_held_mb, config.max_body_mb
    remedy = f"use {2 * body} or more"
    require(
        held >= 2 * body,
        "max_held_mb",
        f"hold a request and its answer, max_body_mb={body} each",
        held,
        remedy,
    )
    port = config.port
    holds = isinstance(port, int) and not isinstance(port, bool) and 0 <= port < 2**16
    require(holds, "port", "be a port, or 0 for a free one", port, "use 8765")
    check_scratch(config.head_scratch_mb, "head_scratch_mb")
    check_layout(config.layout, "layout")
    there = {"cpu": True, "cuda": torch.cuda.is_available()}.get(config.accelerator, False)
    require(there, "accelerator", "be cpu, or cuda where there is a GPU", config.accelerator, "use cpu")
    token = read_token(str(config.token_env))
    require(
        token is not None or config.host in ("127.0.0.1", "::1", "localhost"),
        "host",
        f"be a loopback address without a token in the environment variable {config.token_env}",
        config.host,
        f"set {config.token_env} here and for each run, or use host=127.0.0.1 behind an ssh tunnel",
    )
    return token


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def load(config: DictConfig) -> Bench:
    """Load the teacher.

    Raises:
        ConfigError: there is none that can be served.
    """
    source = build(config.teacher)
    remedy = "use teacher=builtin teacher.path=…, and teacher=self in the run itself"
    local = isinstance(source, LocalTeacher)
    require(local, "teacher", "be a model by its path", type(source).__name__, remedy)
    tau = source.scoring_temperature
    remedy = "leave it null: each run says its own, student.scoring_temperature"
    require(tau is None, "teacher.scoring_temperature", "be null in a server", tau, remedy)
    require(source.cache is None, "teacher.cache", "be null in a server", source.cache, "set it in the run")
    require(source.offload is None, "teacher.offload", "be null in a server", source.offload, "leave it out")
    require(not source.shard, "teacher.shard", "be false in a server", source.shard, "leave it out")
    check_dtype(source.dtype, "teacher.dtype")
    named, trust = (source.path, "teacher.path"), source.trust_remote_code
    tokenizer = load_tokenizer(*named, trust)
    width, scratch = vocabulary_width(*named, trust), config.head_scratch_mb
    how = {"trust": trust, "quantization": configured(source.quantization)}
    scorer = load_scorer(*named, source.dtype, width, scratch, 1.0, config.layout, **how)
    model = scorer.eval().requires_grad_(False).to(config.accelerator).model
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    info = ServerInfo(
        version=VERSION,
        path=source.path,
        dtype=source.dtype,
        model=weights_digest(model),
        vocab=width,
        context=config.context or trained or 2**20,
        most_ids=config.max_ids,
        most_bytes=config.max_body_mb * 2**20,
        tokenizer=TokenizerIdentity.of(tokenizer),
    )
    return Bench(
        model=model, info=info, scratch=scorer.scratch, layout=config.layout, tokens=config.tokens_per_batch
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"`port` must be free on `host`, got {host} port {port} ({error.strerror}); use another, or port=0"
        ) from error
    return listening


def serve(config: DictConfig) -> None:
    """Load the teacher and answer until SIGINT or SIGTERM; what is being scored then is answered first.

    Raises:
        ConfigError: settings or models that cannot work, or a port that is taken.
    """
    try:
        import uvicorn

        from opd_lightning.serving.app import Service
    except ImportError as error:
        raise ConfigError(
            f"`serve_teacher` must have its server library, got no {error.name}; pip install 'opd-lightning[serve]'"
        ) from error
    token = check(config)
    bench = load(config)
    service = Service.of(bench, config.max_held_mb * 2**20, token)
    listening = listen(config.host, config.port)
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    guard = f"with the token of ${config.token_env}" if token else "without a token"
    server = uvicorn.Server(
        uvicorn.Config(
            service.application(),
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=config.grace_s,
        )
    )
    # uvicorn gives the signals on when it has stopped; then the process ends by itself.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopped)
    print(
        f"teacher   {config.teacher.path}, {bench.info.vocab} ids, rows of at most {bench.info.context} tokens"
    )
    print(f"serving at {address} {guard}: teacher=served teacher.address={address}", flush=True)
    server.run(sockets=[listening])
    with contextlib.suppress(BrokenPipeError):  # who started it may be gone
        print("stopped", flush=True)


def _stopped(number: int, frame: FrameType | None) -> None:
    """Do nothing: the server has been told by the same signal."""


@command("serve_teacher")
def main(config: DictConfig) -> None:
    """Command line entry."""
    quiet()
    logging.getLogger("uvicorn").handlers.clear()
    serve(config)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
