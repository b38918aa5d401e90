"""The shape of a model: what its memory and its arithmetic follow from. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from opd_lightning.diagnostics.utilisation import Work
from opd_lightning.layers import repeated_layers
from opd_lightning.lora import Lora
from opd_lightning.models import empty_model


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a causal language model.

    Args:
        weights: all of them, a tied head once.
        trained: those that are trained; with adapters, theirs.
        body: those of all layers.
        layer: those of the largest layer.
        ends: those of embedding and head, a tied one once.
        tied: whether the head is the embedding.
        layers: how many there are.
        hidden, vocab: width of the hidden states, and of the logits.
        query, key: width of all queries, and of all keys, of a token.
        inner: width of the MLP; of a mixture of experts, of those that a token meets together.
        norms: norms of a layer over the hidden states.
        query_norm: whether queries and keys have norms of their own.
        work: weights that a token is multiplied with.
    """

    weights: int
    trained: int
    body: int
    layer: int
    ends: int
    tied: bool
    layers: int
    hidden: int
    vocab: int
    query: int
    key: int
    inner: int
    norms: int
    query_norm: bool
    work: Work

    @classmethod
    def at(cls, path: str, field: str, lora: Lora | None = None, trust: bool = False) -> ModelShape:
        """Return the shape of the model at ``path``; ``field`` names it in errors.

        Raises:
            ConfigError: no configuration of a causal language model can be read there.
        """
        model = empty_model(path, field, trust)
        if lora is not None:
            with torch.device("meta"):
                lora.add_to(model, 0)
        return cls.of(model)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """Return the shape of a model, with or without memory for its weights."""
        config = model.config.get_text_config()
        layers = repeated_layers(model)
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        tied = head.weight is embedding.weight or bool(getattr(config, "tie_word_embeddings", False))
        total, trained = (_count(model, only) for only in (False, True))
        if tied and head.weight is not embedding.weight:  # not tied yet where there is no memory
            total, trained = total - head.weight.numel(), trained - _trained(head.weight)
        own = list(layers[0].named_parameters()) if layers else []
        wide = [name for name, p in own if p.ndim == 1 and p.numel() == config.hidden_size]
        return cls(
            weights=total,
            trained=trained,
            body=sum(_count(layer, False) for layer in layers),
            layer=max((_count(layer, False) for layer in layers), default=0),
            ends=embedding.weight.numel() + (0 if tied else head.weight.numel()),
            tied=tied,
            layers=len(layers),
            hidden=int(config.hidden_size),
            vocab=int(head.weight.shape[0]),
            query=_heads(config) * _head_dim(config),
            key=int(getattr(config, "num_key_value_heads", None) or _heads(config)) * _head_dim(config),
            inner=_inner(config),
            norms=max(2, sum("norm" in name for name in wide)),
            query_norm=any("q_norm" in name for name, _ in own),
            work=Work.of_model(model, int(head.weight.shape[0])),
        )


def _count(module: nn.Module, trained: bool) -> int:
    return sum(_trained(p) if trained else p.numel() for p in module.parameters())


def _trained(parameter: torch.Tensor) -> int:
    return parameter.numel() if parameter.requires_grad else 0


def _heads(config: Any) -> int:
    return int(getattr(config, "num_attention_heads", 1))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // _heads(config))


def _inner(config: Any) -> int:
    """Return the width of the MLP that a token meets."""
    chosen = getattr(config, "num_experts_per_tok", None)
    expert = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    if chosen and expert:
        shared = getattr(config, "shared_expert_intermediate_size", None) or 0
        shared += (getattr(config, "n_shared_experts", None) or 0) * expert
        return int(chosen * expert + shared)
    return int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
