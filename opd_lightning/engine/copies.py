"""Weights on their way to an engine that keeps a copy of them: which they are, and whether they have changed."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.layers import is_sharded, named_weights
from opd_lightning.lora import adapted, merged


def state_of(model: PreTrainedModel, version: int | None) -> Hashable:
    """Return what is equal for two calls only if no weight was changed between them.

    ``version`` is the number of optimizer steps behind the weights, None where nobody counts them. Beside it
    stand where each parameter lies and how often it was written in place. Sharded parameters say neither
    when they are gathered: there the version has to do, and without one nothing equals anything.
    """
    if is_sharded(model) or any(p.is_inference() for p in model.parameters()):
        return object() if version is None else version
    return version, tuple((p.data_ptr(), p._version) for p in model.parameters())


def config_of(model: PreTrainedModel) -> Any:
    """Return a copy of the model's configuration that names its class, as an engine needs it to."""
    config = copy.deepcopy(model.config)
    config.architectures = config.architectures or [type(model).__name__]
    return config


@torch.no_grad()
def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight, whole, under each name that it has: a tied head too, beside the embedding.

    Adapters are merged: an engine computes with plain weights. Names that the model ties are not left out, as
    they would be in a checkpoint, since an engine may hold a copy for each.
    """
    if adapted(model):
        yield from merged(model, {name: _whole(w) for name, w in named_weights(model)}).items()
    else:
        for name, weight in named_weights(model):
            yield name, _whole(weight)


def _whole(weight: Tensor) -> Tensor:
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.detach()
