"""Generation by vLLM in this process, from a copy of the student's weights that is never stale."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from opd_lightning.engine.asking import as_generation, check_asked, check_length, rankable
from opd_lightning.engine.bounds import check_ahead
from opd_lightning.engine.canary import Canary, due, strayed, tolerance_of, unlike
from opd_lightning.engine.copies import config_of, state_of, weights_of
from opd_lightning.engine.drawn import Record
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.engine.vllm_adapter import Adapter, EngineSettings, check_installed, head_sizes
from opd_lightning.engine.vllm_heads import WiderHeads, wider_heads
from opd_lightning.errors import require
from opd_lightning.layers import compute_dtype, evaluating
from opd_lightning.models import check_dtype
from opd_lightning.types import Generation, PromptBatch, Sampling


@dataclass
class _Held:
    """What an engine has in hand: the model that it draws for, and its copy. Mutable, one an engine."""

    model: PreTrainedModel | None = None
    version: int | None = None
    adapter: Adapter | None = None
    wider: WiderHeads | None = None
    pushes: int = 0
    gap: float | None = None
    canary: Canary = field(default_factory=Canary)


@dataclass(frozen=True, kw_only=True)
class VllmEngine:
    """Draws the student's responses with vLLM, which holds a second copy of the weights on the same device.

    A changed weight is sent before the next draw, all of them in place. After the first sending, and each
    ``check_every``-th, with adapters after each, a few tokens are drawn and their log-probs compared with the
    student's own.
    The copy belongs to one model: the one of :meth:`bind`, else the first that is generated for. Others (a
    teacher that writes) are run by ``engine=transformers`` with its defaults.

    Args:
        dtype: of the copy; None for what the student computes in.
        memory: share of the GPU's memory for weights and cache together; unused on a CPU.
        kv_cache_mb: size of the cache on a CPU; unused on a GPU.
        max_model_len: longest prompt with response; None for what the model allows.
        rows: responses in flight at once, at most.
        enforce_eager: no CUDA graphs: slower, but less memory and a faster start. A CPU has none.
        sleep: give back the GPU's memory between generations; unused on a CPU.
        check_every: sendings from one comparison to the next; 0 for the first alone. With adapters, unless it
            is 0, each is compared.
        tolerance: largest difference of a log-prob in nats; None for 1e-3 in float32 and 0.3 in a half type.
        ahead: collections that are written before they are needed, by the weights of that time.

    Raises:
        ConfigError: vLLM is not installed, or a number is out of its range.
    """

    dtype: str | None = None
    memory: float = 0.4
    kv_cache_mb: int = 256
    max_model_len: int | None = None
    rows: int = 128
    enforce_eager: bool = False
    sleep: bool = True
    check_every: int = 16
    tolerance: float | None = None
    ahead: int = 0
    _held: _Held = field(default_factory=_Held, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_dtype(self.dtype, "engine.dtype")
        require(0 < self.memory < 1, "engine.memory", "be in (0, 1)", self.memory, "use 0.4")
        least: dict[str, tuple[Any, int]] = {
            "kv_cache_mb": (self.kv_cache_mb, 1),
            "rows": (self.rows, 1),
            "check_every": (self.check_every, 0),
            "max_model_len": (16 if self.max_model_len is None else self.max_model_len, 16),
        }
        for name, (value, low) in least.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
            require(whole, f"engine.{name}", f"be a whole number of at least {low}", value, "raise it")
        positive = self.tolerance is None or self.tolerance > 0
        require(positive, "engine.tolerance", "be above 0", self.tolerance, "use null")
        check_ahead(self.ahead)
        check_installed()

    def bind(self, model: PreTrainedModel, version: int) -> None:
        """Draw for ``model``, whose weights have ``version`` optimizer steps behind them from now on."""
        held = self._held
        require(
            held.model in (None, model),
            "engine",
            "draw for one student",
            "another one",
            "build an engine for each",
        )
        held.model, held.version = model, version

    def rest(self) -> None:
        """Give back the GPU's memory until the next draw."""
        if self.sleep and self._held.adapter is not None:
            self._held.adapter.sleep()

    @property
    def gap(self) -> float | None:
        """The difference that the last comparison found, in nats; None before the first."""
        return self._held.gap

    def generate(self, model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> Generation:
        """Draw one response for each row of ``prompts``, each from its own seed, with the weights as they are now.

        ``behavior_logp`` is that of the truncated, renormalised sampler (0 where greedy). ``top_ids`` come
        with it unless the sampler truncates, since vLLM then ranks only what is left; the collector scores
        the student where they are missing.

        Raises:
            ConfigError: settings out of range, a request longer than the engine allows, or weights that did
                not arrive.
        """
        held = self._held
        held.model = held.model or model
        if model is not held.model:
            return TransformersEngine().generate(model, prompts, sampling)
        check_asked(prompts, sampling)
        # Lightning evaluates in inference mode, in which the copy's weights could not be replaced later.
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            if len(prompts) == 0:
                return Record(0, sampling, prompts.ids.device).generation()
            adapter = self._fresh(model, prompts)
            rows = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
            check_length(rows, sampling, adapter.longest)
            asked = rankable(sampling)
            with torch.autocast(model.device.type, enabled=False):
                drawn = adapter.draw(rows, prompts.seeds, asked)
            return as_generation(drawn, asked, prompts.ids.device)

    # -- the copy of the weights

    def _fresh(self, model: PreTrainedModel, prompts: PromptBatch) -> Adapter:
        """Return the engine with the weights as they are now."""
        held = self._held
        if held.adapter is None:
            held.wider = wider_heads(model.config, head_sizes(model.device))
            config = config_of(model) if held.wider is None else held.wider.config(config_of(model))
            with torch.autocast(model.device.type, enabled=False):
                held.adapter = Adapter(config, self._settings(model), model.device)
        adapter, wanted = held.adapter, state_of(model, held.version)
        if adapter.version != wanted:
            self._push(model, adapter, wanted)
            held.pushes += 1
            require(
                adapter.version == wanted,
                "engine",
                "hold the weights of this step before it draws",
                "older ones",
                "report it: the sending was skipped or failed",
            )
            held.canary.settle(prompts, adapter.block, adapter.longest)
            if due(model, held.pushes, self.check_every):
                self._compare(model, adapter)
        return adapter

    def _push(self, model: PreTrainedModel, adapter: Adapter, version: object) -> None:
        weights = weights_of(model)
        with torch.autocast(model.device.type, enabled=False):
            adapter.push(weights if self._held.wider is None else self._held.wider.weights(weights), version)

    def _compare(self, model: PreTrainedModel, adapter: Adapter) -> None:
        """Stop the run if the engine computes something else than the trainer; say what differs."""
        held, allowed = self._held, self._tolerance(model)
        held.gap = held.canary.gap(adapter.draw, model)
        if held.gap <= allowed:
            return
        gap = held.gap
        adapter.forget()
        if held.canary.gap(adapter.draw, model) <= allowed:
            cause = "keys and values of older weights that its prefix cache kept"
        else:
            weights = weights_of(model)
            named = weights if held.wider is None else held.wider.weights(weights)
            differ, count = unlike(named, adapter.sums(), adapter.packed())
            cause = f"weights that differ: {', '.join(differ[:5])}" if differ else _unseen(count)
        raise strayed(gap, allowed, held.pushes, cause)

    # -- settings

    def _settings(self, model: PreTrainedModel) -> EngineSettings:
        return EngineSettings(
            dtype=self._dtype(model),
            rows=self.rows,
            max_model_len=self.max_model_len,
            memory=self.memory,
            kv_cache_mb=self.kv_cache_mb,
            enforce_eager=self.enforce_eager,
        )

    def _dtype(self, model: PreTrainedModel) -> str:
        return self.dtype or str(compute_dtype(model)).removeprefix("torch.")

    def _tolerance(self, model: PreTrainedModel) -> float:
        return tolerance_of(self.tolerance, self._dtype(model))


def _unseen(count: int) -> str:
    return (
        f"the {count} weights that could be read agree, so that it is one that vLLM repacks, such as a tied head, or "
        "the computation itself"
    )
