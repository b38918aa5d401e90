"""Which models the decoder runs: exact classes and features, and a comparison with the model's own forward."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from opd_lightning.engine.decoder import Decoder

_FAMILIES: tuple[type[nn.Module], ...] = (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
_ROTARY = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles do not depend on how long the sequence has become."""
_PLAIN = (nn.Linear, nn.Embedding)

_agreement: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def supports(model: PreTrainedModel) -> bool:
    """Return whether :func:`~opd_lightning.engine.decoder.read` and the decoder describe ``model`` completely.

    They do for an unmodified Llama, Mistral, Qwen2 or Qwen3 with full attention whose weights are plain
    tensors on one device. Adapters, quantised or tensor-parallel layers, weights that are still sharded,
    hooks, replaced forwards and sliding windows are refused.
    """
    if _own_class(model) not in _FAMILIES:
        return False
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    plain_rope = rope.get("rope_type", "default") in _ROTARY
    windows = getattr(config, "sliding_window", None) is not None
    return plain_rope and not windows and _untouched(model) and _plain_weights(model)


def agrees(
    model: PreTrainedModel,
    decoder: Decoder,
    ids: Int[Tensor, "batch prompt"],
    mask: Bool[Tensor, "batch prompt"],
) -> bool:
    """Return whether the decoder's logits equal the model's own; compared once a model, on two prompts.

    The decoder reads all but the last token, then the last one in a step of its own, so that both of its
    passes are seen. A difference beyond rounding is warned about, and the caller uses another path.
    """
    if model not in _agreement:
        rows = mask.sum(-1).sort().indices[[0, -1]]
        _agreement[model] = _same(model, decoder, ids[rows], mask[rows])
        if not _agreement[model]:
            warnings.warn(
                f"the fast decoder does not reproduce this {type(model).__name__}, so the library's own "
                "loop generates; engine.method=generate asks for it at once",
                stacklevel=2,
            )
    return _agreement[model]


def _same(model: PreTrainedModel, decoder: Decoder, ids: Tensor, mask: Tensor) -> bool:
    position = (mask.cumsum(-1) - 1).clamp_(min=0)
    expected = model(
        input_ids=ids, attention_mask=mask.long(), position_ids=position, use_cache=False, logits_to_keep=1
    ).logits[:, -1]
    if ids.shape[1] > 1 and bool(mask[:, -2].all()):
        _, state = decoder.prefill(ids[:, :-1], mask[:, :-1], 1)
        got, _ = decoder.step(ids[:, -1], state)
    else:
        got, _ = decoder.prefill(ids, mask, 1)
    # The square root of the precision, in units of the logits' size: 3e-4 in float32, 0.09 in bfloat16.
    bound = torch.finfo(expected.dtype).eps ** 0.5 * expected.float().abs().amax()
    return bool((got.float() - expected.float()).abs().amax() <= bound)


def _own_class(module: nn.Module) -> type:
    """Return a module's class; FSDP2 puts one of its own in front, with the original behind it."""
    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))


def _untouched(model: nn.Module) -> bool:
    for module in model.modules():
        hooked = module._forward_hooks or module._forward_pre_hooks
        if "forward" in vars(module) or (hooked and not isinstance(module, FSDPModule)):
            return False
        # A subclass of a linear layer or an embedding computes something else: adapter, quantiser, parametrization.
        if isinstance(module, _PLAIN) and _own_class(module) not in _PLAIN:
            return False
    body = model.get_submodule("model")
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    # Every layer: an adapter may sit on some of them only, and adds nothing yet when it is first compared.
    layers = list(body.get_submodule("layers").children())
    return all(_own_class(layer.get_submodule(name)) is nn.Linear for layer in layers for name in names)


def _plain_weights(model: nn.Module) -> bool:
    weights = list(model.parameters())
    return (
        len({weight.device for weight in weights}) == 1
        and all(weight.is_floating_point() for weight in weights)
        # Sharded or quantised: a tensor around others.
        and not any(is_traceable_wrapper_subclass(weight) for weight in weights)
    )
