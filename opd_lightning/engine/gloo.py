"""Tensors from one process to others over TCP: torch's gloo, in a group that no process-wide state knows of."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def address_towards(host: str, port: int) -> str:
    """Return this machine's own address on the way to ``host``; nothing is sent.

    Raises:
        OSError: no such host, or no way there.
    """
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def free_port(address: str, port: int = 0) -> int:
    """Return a port of this machine's ``address`` that was free a moment ago: ``port``, or any for 0.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """
    with _bound(address, port) as probe:
        return int(probe.getsockname()[1])


def _bound(address: str, port: int) -> socket.socket:
    family, kind, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
    except OSError:
        bound.close()
        raise
    return bound


@dataclass(kw_only=True)
class GlooGroup:
    """The trainer (rank 0) and a server's workers. Each waits for the others as it is built.

    Args:
        address: the trainer's.
        port: at which it listens; nobody else on that network should reach it.
        rank: of this process.
        size: processes.
        timeout_s: longest wait for another process.
        meanwhile: called every now and then while the trainer waits for the others to come; may raise.

    Raises:
        RuntimeError: another process did not come within ``timeout_s``.
    """

    address: str
    port: int
    rank: int
    size: int
    timeout_s: float
    meanwhile: Callable[[], object] = lambda: None
    _group: dist.ProcessGroupGloo | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        store, wait = self._store(), timedelta(seconds=self.timeout_s)
        own = self.address if self.rank == 0 else address_towards(self.address, self.port)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        # By itself gloo takes the address of the machine's name, which may be one that others do not reach.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own, lazy_init=False)]
        options._timeout = wait
        self._group = dist.ProcessGroupGloo(store, self.rank, self.size, options)

    def _store(self) -> dist.TCPStore:
        """Return what the processes find each other by, when all have come."""
        wait: Any = {"timeout": timedelta(seconds=self.timeout_s), "use_libuv": False}
        if self.rank:
            store = dist.TCPStore(self.address, self.port, self.size, is_master=False, **wait)
            store.set(f"{self.rank} came", "")
            return store
        # Torch's own listener would take every address of the machine.
        listener = _bound(self.address, self.port)
        listener.listen()
        listens: Any = wait | {"master_listen_fd": listener.detach(), "wait_for_workers": False}
        store = dist.TCPStore(self.address, self.port, self.size, is_master=True, **listens)
        self._await(store)
        return store

    def _await(self, store: dist.TCPStore) -> None:
        """Return when all have come: inside torch nothing could end the wait but its time."""
        others, until = [f"{rank} came" for rank in range(1, self.size)], time.monotonic() + self.timeout_s
        while not store.check(others):
            self.meanwhile()
            if time.monotonic() > until:
                raise RuntimeError(f"not all came to {self.address}:{self.port} within {self.timeout_s:g} s")
            time.sleep(0.02)

    def send(self, tensor: Tensor) -> None:
        """Send ``tensor`` from the trainer to every other process.

        Raises:
            RuntimeError: one of them is gone, or does not answer within ``timeout_s``.
        """
        self._broadcast(tensor.detach().cpu().contiguous())

    def received(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the next tensor that the trainer sends, on the CPU.

        Raises:
            RuntimeError: the trainer is gone, or does not send within ``timeout_s``.
        """
        tensor = torch.empty(tuple(shape), dtype=dtype)
        self._broadcast(tensor)
        return tensor

    def _broadcast(self, tensor: Tensor) -> None:
        if tensor.numel():
            # As bytes, since gloo knows not every dtype.
            if self._group is None:
                raise RuntimeError("the group was left")
            self._group.broadcast(tensor.reshape(-1).view(torch.uint8), 0).wait()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Leave the group, which the others are told, when nothing is on its way any more."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def each_received(
    group: GlooGroup, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of these names, dtypes (``"bfloat16"``) and shapes as they come from the trainer."""
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        yield name, group.received(shape, getattr(torch, dtype))
