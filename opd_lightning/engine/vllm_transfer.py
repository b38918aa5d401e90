"""vLLM's weight transfer (0.32): tensors from this process into a server's workers, without a folder between them.

A server is started with ``--weight-transfer-config '{"backend": ...}'``. A sending is the same for every backend:
the server's routes are told what comes, the tensors take the backend's way, the routes are told that all came.

- ``gloo``: our own backend ``opd_gloo``, over TCP, between any two devices. This process needs no vLLM for it.
- ``nccl``, ``ipc``: vLLM's own, by its own trainer classes, between GPUs and within one.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlparse

import torch

from opd_lightning.engine.gloo import address_towards, free_port
from opd_lightning.engine.vllm_adapter import check_installed
from opd_lightning.engine.vllm_http import Refused, Server, Unanswered
from opd_lightning.engine.vllm_sending import (
    Beside,
    Client,
    GlooTrainer,
    Result,
    Source,
    Trainer,
    Weights,
    vllms_own,
)
from opd_lightning.errors import ConfigError, require

BACKENDS = {"gloo": "opd_gloo", "nccl": "nccl", "ipc": "ipc"}
"""vLLM's names of what ``engine.transfer`` may be beside ``folder``."""


_LEAVING_S = 6
"""Longest wait for a group to be left; vLLM's NCCL takes up to 5 seconds."""


class Gone(ConfigError):
    """The server left while it was sent weights. One that is back may be sent all of them again."""


@dataclass
class Transfer:
    """The way to one server, which is opened at the first sending and again after a failure. Mutable.

    Args:
        kind: a key of :data:`BACKENDS`.
        server: where to.
        address: as ``engine.transfer_address``.
    """

    kind: str
    server: Server
    address: str | None
    _trainer: Trainer | None = field(default=None, init=False, repr=False)
    _client: Client = field(init=False, repr=False)

    def bring(self, weights: Weights, version: str) -> None:
        """Have the server's workers hold ``weights``, by the name ``version``; the server draws nothing meanwhile.

        Raises:
            ConfigError: the server refuses them, or takes longer than ``timeout_s``.
            Gone: it left before the end.
        """
        if self._trainer is None:
            self._client = Client(self.server)
            self._trainer = self._watched(lambda: self._open(Source.of(weights)))
        self._client.version = version
        self._watched(self._trainer.send_weights)

    def forget(self) -> None:
        """Leave the workers, who may be gone; the next sending meets them anew."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            # It may wait for what is gone; but a port that the user chose has to be free again.
            Beside(trainer.shutdown).join(_LEAVING_S)

    def _open(self, source: Source) -> Trainer:
        if self.kind == "ipc":
            return vllms_own("ipc", {}, self._client, source)
        host, port = _place(self.address)
        seen = urlparse(self.server.url)
        host = host or address_towards(str(seen.hostname), seen.port or 80)
        try:
            port = free_port(host, port or 0)  # asked for before the server is told
        except OSError as error:
            raise ConfigError(
                f"`engine.transfer_address` must be an address of this machine, and a port of it that is free, got "
                f"{self.address or host!r} ({error}); use null, or one that `hostname -I` prints"
            ) from error
        size = 1 + self.server.workers()
        if self.kind == "gloo":
            return GlooTrainer.trainer_init(
                host, port, size, self.server.timeout_s, client=self._client, source=source
            )
        # Not packed: that sends from streams of its own, which do not wait for what is still being computed.
        info = {"master_address": host, "master_port": port, "world_size": size, "packed": False}
        return vllms_own("nccl", info, self._client, source)

    def _watched(self, act: Callable[[], Result]) -> Result:
        """Return what ``act`` does, or raise when it fails, the server refuses it, or nothing comes of it."""
        task, until = Beside(act), time.monotonic() + self.server.timeout_s
        while task.is_alive() and self._client.failure is None and time.monotonic() < until:
            task.join(0.1)
        try:
            if self._client.failure is not None:
                raise self._client.failure
            if task.is_alive():
                raise TimeoutError(f"no end within {self.server.timeout_s:g} s")
            return task.result()
        except Exception as error:
            self.forget()
            if isinstance(error, Refused):
                raise self._refused(error) from error
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(error, (RuntimeError, OSError, AssertionError, Unanswered)):
                raise self._ended(error) from error
            raise

    def _ended(self, error: Exception) -> ConfigError:
        said = error.said if isinstance(error, Unanswered) else str(error)
        reason = (said.splitlines() or [type(error).__name__])[0][:200]
        kind = ConfigError if isinstance(error, TimeoutError) else Gone  # another wait as long helps nobody
        return kind(
            f"`engine.url` must be a vLLM server that takes all weights, got {self.server.url!r}, which did not "
            f"({reason}); see its log, and start it with {_flag(self.kind)} if it has ended"
        )

    def _refused(self, error: Refused) -> ConfigError:
        found = re.search(r"failed with error '(.*)', please check", error.said)
        reason = (found[1] if found else error.said)[:300]
        flagged = error.path == "/init_weight_transfer_engine" or "INSECURE_SERIALIZATION" in reason
        if not flagged:
            return ConfigError(
                f"`engine.url` must be a vLLM server for this student, got {self.server.url!r}, which refuses its "
                f"weights at {error.path} ({reason}); start it on the config.json in engine.folder"
            )
        return ConfigError(
            f"`engine.transfer` must be what the server at {self.server.url} was started for, got {self.kind!r} and "
            f"its refusal ({reason}); start it with {_flag(self.kind)}"
        )


def check_transfer(kind: str, url: str, address: str | None) -> None:
    """Raise ConfigError unless weights may go to ``url`` this way."""
    known = ("folder", *BACKENDS)
    require(kind in known, "engine.transfer", f"be one of {', '.join(known)}", kind, "use folder")
    text = address is None or isinstance(address, str)
    require(text, "engine.transfer_address", "be host or host:port", address, "use null")
    host, port = _place(address)
    require(
        kind in ("gloo", "nccl") or address is None,
        "engine.transfer_address",
        f"be null with engine.transfer={kind}, for which nobody meets",
        address,
        "leave it out",
    )
    require(
        address is None or (bool(host) and port is not None and port < 65536),
        "engine.transfer_address",
        "be host or host:port",
        address,
        "use null",
    )
    if kind not in ("nccl", "ipc"):
        return
    check_installed()
    require(
        torch.cuda.is_available(),
        "engine.transfer",
        f"be folder or gloo where the student has no CUDA device, which {kind} sends from",
        kind,
        "use engine.transfer=gloo",
    )
    require(
        kind != "ipc" or _is_here(str(urlparse(url).hostname)),
        "engine.transfer",
        f"be folder, gloo or nccl for the server at {url}, which is not on this machine",
        kind,
        "use engine.transfer=nccl",
    )


def check_device(kind: str, device: torch.device) -> None:
    """Raise ConfigError where weights on ``device`` cannot be sent this way."""
    require(
        kind not in ("nccl", "ipc") or device.type == "cuda",
        "engine.transfer",
        "be folder or gloo for a student on the CPU",
        kind,
        "use trainer=gpu, or engine.transfer=gloo",
    )


def _place(address: str | None) -> tuple[str, int | None]:
    """Return host and port, 0 for any; the port is None where it is no number."""
    host, _, port = (address or "").partition(":")
    return host, (int(port) if port.isdecimal() else None) if port else 0


def _is_here(host: str) -> bool:
    """Return whether ``host`` is an address of this machine."""
    with suppress(OSError):
        return free_port(socket.gethostbyname(host)) > 0
    return False


def _flag(kind: str) -> str:
    flag = f"""--weight-transfer-config '{{"backend": "{BACKENDS[kind]}"}}'"""
    if kind == "gloo":
        return f"{flag} in an environment in which opd-lightning is installed"
    return flag if kind == "nccl" else f"{flag} and VLLM_ALLOW_INSECURE_SERIALIZATION=1"
