"""What sends weights to a vLLM server's workers (0.32): the trainer's side of vLLM's weight transfer."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from opd_lightning.engine.gloo import GlooGroup
from opd_lightning.engine.vllm_http import Refused, Server
from opd_lightning.errors import ConfigError

MARGIN_S = 10
"""How much longer than a caller the routes and the group wait: what is late is said in one place."""

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""A fresh pass over the weights by their transformers names, as often as it is called."""

Result = TypeVar("Result")


class Trainer(Protocol):
    """The trainer's side of a backend: what vLLM's ``TrainerWeightTransferEngine`` is called by."""

    def send_weights(self) -> None:
        """Send all weights of the source, and return when the server holds them."""

    def shutdown(self) -> None:
        """Leave the server's workers."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What is known of a tensor that is to come; the fields of vLLM's ``ParamMeta``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """The weights, as vLLM's trainers ask a ``WeightSource`` for them. Their shapes are looked up once."""

    weights: Weights
    described: tuple[Described, ...]

    @classmethod
    def of(cls, weights: Weights) -> Source:
        """Return a source whose passes have the shapes of the first one."""
        met = [Described(name=name, dtype=w.dtype, shape=tuple(w.shape)) for name, w in weights()]
        return cls(weights, tuple(met))

    def metadata(self) -> list[Described]:
        """Return what a pass yields, in its order."""
        return list(self.described)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.weights()


@dataclass
class Client:
    """The server's four routes, as vLLM's trainers call a ``VLLMWeightSyncClient``; none is asked twice.

    The first failure is kept, since a trainer that waits for the server's workers does not return with it.
    ``version`` is the name of the weights that are sent.
    """

    server: Server
    version: str = ""
    failure: ConfigError | None = None
    _met: bool = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the workers meet this process."""
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Tell that weights come. What an earlier sending left in the middle, by whomever, is ended first.

        vLLM would go on with it: a layer that had half of its weights would take half of the new ones.
        """
        if not self._met:
            with suppress(Refused):  # if the earlier one is still open
                self._once.ask("/start_weight_update", {})
            self._post("/finish_weight_update", {})
            self._met = True
        self._post("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Tell which weights come, and return when they came."""
        info = dict(update_info)
        if (handles := info.pop("ipc_handles", None)) is not None:
            info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self._post("/update_weights", {"update_info": info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Tell that all weights came, and which version they are.

        With one request for both, no server that is started in between gets the name without the weights.
        """
        self._post("/finish_weight_update", {"weight_version": weight_version or self.version})

    @property
    def _once(self) -> Server:
        """The server, asked once."""
        return replace(self.server, retries=0, timeout_s=self.server.timeout_s + MARGIN_S)

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        try:
            self._once.ask(path, body)
        except ConfigError as error:
            self.failure = self.failure or error
            raise


@dataclass(frozen=True, kw_only=True)
class GlooTrainer:
    """The trainer's side of ``opd_gloo``: every tensor as it is, one after the other; no vLLM is imported."""

    client: Client
    source: Source
    group: GlooGroup

    @classmethod
    def trainer_init(
        cls, address: str, port: int, world_size: int, timeout_s: float, *, client: Client, source: Source
    ) -> GlooTrainer:
        """Meet the server's workers at this machine's ``address``."""
        place = {"address": address, "port": port, "size": world_size, "timeout_s": timeout_s + MARGIN_S}
        asked = Beside(lambda: client.init_weight_transfer_engine(place))
        group = GlooGroup(**place, rank=0, meanwhile=asked.check)  # type: ignore[arg-type]
        asked.result()
        return cls(client=client, source=source, group=group)

    def send_weights(self) -> None:
        """Send all weights of the source.

        Raises:
            ValueError: a pass over the weights that is unlike the first.
        """
        described = self.source.metadata()
        told = {
            "names": [one.name for one in described],
            "dtype_names": [str(one.dtype).removeprefix("torch.") for one in described],
            "shapes": [list(one.shape) for one in described],
        }
        self.client.start_weight_update()
        asked = Beside(lambda: self.client.update_weights(told))
        for (name, weight), one in zip(self.source, described, strict=True):
            if (name, weight.dtype, tuple(weight.shape)) != (one.name, one.dtype, one.shape):
                raise ValueError(f"{one} was to be sent, and {name} of shape {tuple(weight.shape)} came")
            self.group.send(weight)
        asked.result()
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Leave the group."""
        self.group.close()


class Beside(Thread, Generic[Result]):
    """A call in a thread that a process does not wait for when it ends."""

    def __init__(self, act: Callable[[], Result]) -> None:
        super().__init__(daemon=True)
        self._act, self._device = act, torch.cuda.current_device() if torch.cuda.is_available() else None
        self._result: Result | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Call it, on the GPU of the thread that asked for it."""
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self._result = self._act()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise what the call raised, if it has."""
        if self._error is not None:
            raise self._error

    def result(self) -> Result:
        """Wait for the call; return or raise what it did."""
        self.join()
        self.check()
        return self._result  # type: ignore[return-value]


def vllms_own(kind: str, info: Mapping[str, Any], client: Client, source: Source) -> Trainer:
    """Return vLLM's trainer of this kind, which has met the workers; one process trains."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    made = (IPCTrainerInitInfo if kind == "ipc" else NCCLTrainerInitInfo)(**info, rank=0)
    trainer: Trainer = WeightTransferTrainerFactory.trainer_init(made, client=client, source=source)
    return trainer
