"""Generation by a vLLM server at an address, which is sent the student's weights, or reloads them from a folder."""

from __future__ import annotations

import uuid
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from opd_lightning.engine.asking import as_generation, check_asked, check_length, rankable
from opd_lightning.engine.bounds import check_ahead
from opd_lightning.engine.canary import Canary, due, strayed, tolerance_of
from opd_lightning.engine.copies import config_of, state_of, weights_of
from opd_lightning.engine.digests import wrong
from opd_lightning.engine.drawn import Record
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.engine.vllm_heads import WiderHeads, wider_heads
from opd_lightning.engine.vllm_http import FIRST, Restarted, Server, check_url
from opd_lightning.engine.vllm_transfer import Gone, Transfer, check_device, check_transfer
from opd_lightning.errors import ConfigError, require
from opd_lightning.layers import compute_dtype, evaluating
from opd_lightning.types import Generation, PromptBatch, Sampling

_BLOCK = 128
"""Tokens of a cache block, at most; a server does not say how many its own has."""


@dataclass
class _Held:
    """What was sent to the server last, and for which model. Mutable, one an engine."""

    model: PreTrainedModel | None = None
    version: int | None = None
    state: Hashable = None
    name: str = ""
    arrived: str | None = None
    transfer: Transfer | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    longest: int = 0
    pushes: int = 0
    gap: float | None = None
    canary: Canary = field(default_factory=Canary)


@dataclass(frozen=True, kw_only=True)
class VllmServerEngine:
    """Draws the student's responses with a vLLM server, one request a row, token ids in and out.

    Before the next draw after a weight has changed, all of them are sent as ``transfer`` says. Each response
    brings the version of the weights that wrote it: another one stops the run. To a server that was started
    again all are sent once more, unless what it was asked for was to be written by older ones. Log-probs
    are compared with the student's own as with ``engine=vllm``, and at the start at another temperature too:
    a server that gives raw log-probs is refused, since they are not those of the sampler. One process trains.

    Args:
        url: the server's address. It must run in development mode, which executes what it is asked to: on
            a loopback address or a closed network alone.
        transfer: ``folder``: written to ``folder``, and the server told to reload; ``gloo``, ``nccl``, ``ipc``: by
            vLLM's weight transfer (:mod:`opd_lightning.engine.vllm_transfer`).
        folder: for the weights, the same path on the server's machine; with another ``transfer`` for the
            config.json alone that a server is started on, which None leaves out.
        transfer_address: host or host:port of this machine where the server's workers meet it for ``gloo`` and
            ``nccl``; None for the address on the way to the server and a free port. The tensors go over further
            ports of both.
        head_dim: widen the attention heads with zeros to this size, for a server without a kernel for
            the student's own; None leaves them.
        in_flight: requests at once.
        timeout_s: longest wait for one answer.
        retries: of a request without an answer.
        check_every: sendings from one comparison to the next; 0 for the first alone. With adapters, unless it
            is 0, each is compared.
        tolerance: largest difference of a log-prob in nats; None for 1e-3 where the student computes in float32
            and 0.3 in a half type, autocast's too.
        ahead: collections that are written before they are needed, by the weights of that time: while the
            student trains on the one before.

    Raises:
        ConfigError: a setting out of its range.
    """

    url: str
    folder: str | None
    transfer: str = "folder"
    transfer_address: str | None = None
    head_dim: int | None = None
    in_flight: int = 128
    timeout_s: float = 600
    retries: int = 4
    check_every: int = 16
    tolerance: float | None = None
    ahead: int = 0
    _held: _Held = field(default_factory=_Held, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_url(self.url)
        check_transfer(self.transfer, self.url, self.transfer_address)
        named = bool(self.folder) or (self.transfer != "folder" and self.folder is None)
        require(named, "engine.folder", "name a folder", self.folder, "use runs/served")
        least: dict[str, tuple[Any, int]] = {
            "in_flight": (self.in_flight, 1),
            "retries": (self.retries, 0),
            "check_every": (self.check_every, 0),
            "head_dim": (2 if self.head_dim is None else self.head_dim, 2),
        }
        for name, (value, low) in least.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
            require(whole, f"engine.{name}", f"be a whole number of at least {low}", value, "raise it")
        require(self.timeout_s > 0, "engine.timeout_s", "be above 0", self.timeout_s, "use 600")
        positive = self.tolerance is None or self.tolerance > 0
        require(positive, "engine.tolerance", "be above 0", self.tolerance, "use null")
        check_ahead(self.ahead)

    def bind(self, model: PreTrainedModel, version: int) -> None:
        """Draw for ``model``, whose weights have ``version`` optimizer steps behind them from now on."""
        held = self._held
        mine = held.model in (None, model)
        require(mine, "engine", "draw for one student", "another one", "build an engine for each")
        held.model, held.version = model, version

    def rest(self) -> None:
        """Do nothing: the server's memory is its own."""

    @property
    def server(self) -> Server:
        """The server's routes."""
        settings = {"timeout_s": self.timeout_s, "retries": self.retries, "in_flight": self.in_flight}
        return Server(url=self.url, **settings)  # type: ignore[arg-type]

    def generate(self, model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> Generation:
        """Draw one response for each row of ``prompts``; as :meth:`opd_lightning.engine.vllm.VllmEngine.generate`.

        Raises:
            ConfigError: also a server that does not answer, holds other weights, or gives raw log-probs.
        """
        held = self._held
        held.model = held.model or model
        if model is not held.model:
            return TransformersEngine().generate(model, prompts, sampling)
        check_asked(prompts, sampling)
        if len(prompts) == 0:
            return Record(0, sampling, prompts.ids.device).generation()
        self.follow(model, prompts)
        try:
            return self.draw(model, prompts, sampling)
        except Restarted:  # it came back meanwhile, and the student is as it was
            self.follow(model, prompts)
            return self.draw(model, prompts, sampling)

    def follow(self, model: PreTrainedModel, prompts: PromptBatch) -> None:
        """Send the weights as they are now, unless the server has them; a part of ``prompts`` may be drawn for."""
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            self._follow(model, prompts)

    def draw(self, model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> Generation:
        """Draw as :meth:`generate`, with the weights that were sent last: ``model`` may be trained meanwhile."""
        held = self._held
        check_asked(prompts, sampling)
        with torch.inference_mode(False), torch.no_grad():
            rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
            check_length(rows, sampling, held.longest)
            asked = rankable(sampling)
            drawn = self.server.draw(rows, prompts.seeds, asked, model.config.vocab_size, held.name)
            return as_generation(drawn, asked, prompts.ids.device)

    def _follow(self, model: PreTrainedModel, prompts: PromptBatch) -> None:
        """Have the server hold the weights as they are now."""
        held, wanted = self._held, state_of(model, self._held.version)
        found = None if held.arrived is None else self.server.version()
        if found != held.arrived and held.transfer is not None:
            held.transfer.forget()  # its workers know nothing of this process, or have met another one since
        restarted = found == FIRST
        if held.state == wanted and not restarted:
            return
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        require(
            alone,
            "trainer.devices",
            "be 1 with engine=vllm_server, whose weights one process sends",
            "more",
            "use engine=vllm, which has an engine in each process",
        )
        held.pushes += 1
        held.name = f"{held.run}-{held.pushes}"
        # As they are: autocast would round the adapters that are merged into them.
        with torch.autocast(model.device.type, enabled=False):
            self._send(model)
        held.state, held.arrived = wanted, held.name
        held.canary.settle(prompts, _BLOCK, held.longest)
        if due(model, held.pushes, self.check_every):
            self._compare(model)

    def _send(self, model: PreTrainedModel) -> None:
        """Have the server take the weights, by the name that they have by now."""
        held, server = self._held, self.server
        check_device(self.transfer, model.device)
        if model.device.type == "cuda":
            torch.cuda.synchronize(
                model.device
            )  # another thread sends: its stream knows nothing of the optimizer's
        folder = self.write(model)
        held.longest = held.longest or server.longest()
        if self.transfer == "folder":
            return server.reload(folder, held.name)
        held.transfer = held.transfer or Transfer(self.transfer, server, self.transfer_address)
        bring = partial(held.transfer.bring, partial(self._weights, model), held.name)
        try:
            server.renew(bring)
        except Gone:  # each answer is waited for as long as engine.retries says: it may be on its way back
            server.version()
            server.renew(bring)

    def write(self, model: PreTrainedModel) -> Path:
        """Write to ``folder`` what a server is started on: the configuration, and what reloads from it: weights."""
        folder = Path(self.folder or "").resolve()
        if self.folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            wider, config = self._wider(model), config_of(model)
            (config if wider is None else wider.config(config)).save_pretrained(folder)
        if self.transfer == "folder":
            self._write_weights(model, folder)
        return folder

    def _write_weights(self, model: PreTrainedModel, folder: Path) -> None:
        """Write each weight, a tied one under every name."""
        # A file holds no two names for one storage, and a server must never read half of one.
        apart = {name: weight.cpu().clone().contiguous() for name, weight in self._weights(model)}
        save_file(apart, folder / "writing.tmp", metadata={"format": "pt"})
        (folder / "writing.tmp").rename(folder / "model.safetensors")

    def _wider(self, model: PreTrainedModel) -> WiderHeads | None:
        return wider_heads(model.config, None if self.head_dim is None else (self.head_dim,))

    def _weights(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as they are sent."""
        wider = self._wider(model)
        return weights_of(model) if wider is None else wider.weights(weights_of(model))

    def _differing(self, model: PreTrainedModel) -> str:
        """Return the server's tensors that are not those of ``model``, in words."""
        try:
            names, count = wrong(self._weights(model), self.server.digests())
        except ConfigError as error:  # what is known already matters more
            return f"which tensors is not known: {error}"
        if names:
            return f"of {count} tensors whose digests can be compared {len(names)} differ: {', '.join(names[:5])}"
        return f"the {count} tensors whose digests can be compared are as they were sent"

    def _compare(self, model: PreTrainedModel) -> None:
        """Stop the run if the server computes something else than the trainer."""
        held = self._held
        draw = partial(self.server.draw, width=model.config.vocab_size, version=held.name)
        allowed = tolerance_of(self.tolerance, str(compute_dtype(model)).removeprefix("torch."))
        gap = held.gap = held.canary.gap(draw, model)
        if gap > allowed:
            self.server.forget()
            kept = held.canary.gap(draw, model) <= allowed
            cause = "keys and values of older weights that its prefix cache kept"
            if not kept:
                cause = f"weights, dtype or logprobs mode of the server at {self.url}, or a stale head"
                cause += f"; {self._differing(model)}"
            raise strayed(gap, allowed, held.pushes, cause)
        if held.pushes == 1:
            away = held.canary.gap(draw, model, temperature=2.0)
            require(
                away <= allowed,
                "engine.url",
                "name a server that gives log-probs of its truncated sampler",
                f"others, {away:.3g} nats away at temperature 2",
                "start it with --logprobs-mode processed_logprobs",
            )
