"""Low-rank adapters on a student (arXiv 2106.09685): adding them, leaving them out, merging them for export."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_lightning.errors import ConfigError, require
from opd_lightning.seeds import mix

_NAME = "default"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Trains ``W + alpha / rank * B A`` in place of W, with A of ``rank`` rows, B zero at the start.

    Args:
        rank: columns of B.
        alpha: of the factor alpha / rank.
        dropout: share of A's inputs that are dropped, in training only.
        target_modules: ``"all-linear"``, a list of the modules' last names, or a regular expression.

    Raises:
        ConfigError: a number out of its range.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: str | Sequence[str]

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and self.rank >= 1
        require(whole, "student.lora.rank", "be a whole number of at least 1", self.rank, "use 32")
        above = isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0
        require(above, "student.lora.alpha", "be a number above 0", self.alpha, "use twice the rank")
        share = isinstance(self.dropout, int | float) and 0 <= self.dropout < 1
        require(share, "student.lora.dropout", "be in [0, 1)", self.dropout, "use 0.05")
        require(
            bool(self.target_modules),
            "student.lora.target_modules",
            "name modules",
            self.target_modules,
            "use all-linear",
        )

    def add_to(self, model: PreTrainedModel, seed: int) -> None:
        """Put adapters into ``model``, in place: they alone are trained from then on, in at least float32.

        Raises:
            ConfigError: peft is not installed, no such module, or the embedding or head among them.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConfigError(
                "`student.lora` must be null without peft, got adapters; pip install 'opd-lightning[lora]'"
            ) from error
        named = self.target_modules
        settings = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=named if isinstance(named, str) else list(named),
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.name_or_path,
        )
        # The draw of A is the run's alone: neither how much was drawn before counts, nor is what follows moved.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(seed, "lora") % 2**63)
            try:
                inject_adapter_in_model(settings, model, _NAME)
            except ValueError as error:
                raise ConfigError(
                    f"`student.lora.target_modules` must name modules that adapters fit, got {named!r} "
                    f"({str(error).splitlines()[0]:.200}); use all-linear"
                ) from error
        _refuse_vocabulary(model, named)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        model.train(model.training)  # the new modules come in training mode


def _refuse_vocabulary(model: PreTrainedModel, named: object) -> None:
    """Refuse adapters where weights are read and not called: the head, and the embedding that may be tied to it."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    require(
        not any(hasattr(end, "base_layer") for end in ends),
        "student.lora.target_modules",
        "leave out the embedding and the head",
        named,
        "use all-linear, which does",
    )


def adapted(model: nn.Module) -> dict[str, Any]:
    """Return the layers of ``model`` that have an adapter, by their path; none for a plain model."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Have ``model`` compute without its adapters inside the block, as it did before it had them."""
    layers = adapted(model).values()
    # peft takes the gradient from what is off and gives it to what is on.
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


@torch.no_grad()
def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain model that computes what the adapted ``model`` does.

    ``state`` holds the model's own names, on any device. Sums are taken in at least float32 and rounded once.
    """
    plain = dict(state)
    for path, layer in adapted(model).items():
        base = f"{path}.base_layer."
        for name in [name for name in plain if name.startswith(f"{path}.")]:
            tensor = plain.pop(name)
            if name.startswith(base):
                plain[f"{path}.{name.removeprefix(base)}"] = tensor
        weight, change = plain[f"{path}.weight"], layer.get_delta_weight(_NAME)
        wide = torch.promote_types(weight.dtype, torch.float32)
        plain[f"{path}.weight"] = (weight.to(wide) + change.to(weight.device, wide)).to(weight.dtype)
    return plain


def save_adapter(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters alone to ``folder``, as ``peft.PeftModel.from_pretrained`` reads them.

    ``state`` holds all weights of ``model``, whole, by its own names.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[_NAME].save_pretrained(str(folder))  # type: ignore[union-attr, index, operator]
    weights: Mapping[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=dict(state), adapter_name=_NAME
    )
    named = {f"base_model.model.{name}": w.detach().cpu().contiguous() for name, w in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
