"""The Llama-shaped models (Llama, Mistral, Qwen2, Qwen3), run straight from their weights.

A forward through the library spends more time around the arithmetic of a small model than in it: masks,
cache objects, one module call for each of a hundred small operations. This is the same arithmetic on
the model's own tensors, with nothing around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from opd_lightning.engine.cache import Cache, KeyValueCache
from opd_lightning.layers import compute_dtype

_FUSE_BELOW = 2**24
"""Weights up to this many elements a layer are copied side by side, to be applied in one product."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """``x @ weight.T + bias``."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Root-mean-square norm of the last axis, in float32: ``x / sqrt(mean(x**2) + eps) * weight``."""

    weight: Float[Tensor, "*heads dim"]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised ``x`` in its own dtype."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The tensors of one decoder layer. ``qkv`` and ``gate_up`` hold one product each, or their parts."""

    input_norm: Norm
    qkv: tuple[Linear, ...]
    qk_norm: Norm | None
    out: Linear
    mlp_norm: Norm
    gate_up: tuple[Linear, ...]
    down: Linear
    act: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a decode stands. ``bias`` is 0 at tokens and -inf at left padding, None without padding."""

    cache: KeyValueCache
    position: Int[Tensor, " batch"]
    bias: Float[Tensor, "batch 1 1 slots"] | None
    cos: Float[Tensor, "slots dim"]
    sin: Float[Tensor, "slots dim"]

    def keep(self, order: Int[Tensor, " kept"]) -> State:
        """Return the state of the rows ``order`` of :func:`~opd_lightning.engine.cache.survivors`."""
        self.cache.keep(order)
        bias = None if self.bias is None else self.bias[order]
        return replace(self, position=self.position[order], bias=bias)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model's weights as they are now, and the two passes that decoding needs."""

    embed: Float[Tensor, "vocab hidden"]
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    rotary: nn.Module
    heads: int
    kv_heads: int
    head_dim: int

    def prefill(
        self, ids: Int[Tensor, "batch prompt"], mask: Bool[Tensor, "batch prompt"], budget: int
    ) -> tuple[Float[Tensor, "batch vocab"], State]:
        """Read left-padded prompts; return the logits after the last token and the state to go on from.

        ``budget`` is the number of tokens that may follow.
        """
        batch, prompt = ids.shape
        x = F.embedding(ids, self.embed)
        cos, sin = self.rotations(x, prompt + budget)
        position = (mask.cumsum(-1) - 1).clamp_(min=0)
        like = x.new_empty(0, dtype=compute_dtype(x))
        cache = KeyValueCache(
            len(self.layers), batch, self.kv_heads, self.head_dim, prompt + budget, like=like
        )
        # A padding token may look at itself: with nothing to look at, some attention kernels give it nan,
        # and a zero weight times nan is nan in every other row.
        causal = torch.ones(prompt, prompt, dtype=torch.bool, device=ids.device).tril()
        allowed = causal & mask[:, None, None, :] | torch.eye(prompt, dtype=torch.bool, device=ids.device)
        cache.open(prompt)
        x = self._layers(x, cos[position][:, None], sin[position][:, None], cache, allowed)
        bias = None
        if not mask.all():
            bias = x.new_zeros(batch, 1, 1, prompt + budget)
            bias[:, 0, 0, :prompt].masked_fill_(~mask, -torch.inf)
        state = State(cache=cache, position=position[:, -1], bias=bias, cos=cos, sin=sin)
        return self.head(self.norm(x[:, -1])), state

    def step(self, ids: Int[Tensor, " batch"], state: State) -> tuple[Float[Tensor, "batch vocab"], State]:
        """Read one more token of every row; return the logits after it and the new state."""
        position = state.position + 1
        state.cache.open(1)
        bias = None if state.bias is None else state.bias[..., : state.cache.used]
        logits = self.forward(ids, position, state.cos, state.sin, state.cache, bias)
        return logits, replace(state, position=position)

    def forward(
        self,
        ids: Int[Tensor, " batch"],
        position: Int[Tensor, " batch"],
        cos: Float[Tensor, "positions dim"],
        sin: Float[Tensor, "positions dim"],
        cache: Cache,
        bias: Float[Tensor, "batch 1 1 slots"] | None,
    ) -> Float[Tensor, "batch vocab"]:
        """Return the logits after one more token of every row, at ``position``; nothing here waits for a GPU."""
        x = F.embedding(ids[:, None], self.embed)
        x = self._layers(x, cos[position][:, None, None], sin[position][:, None, None], cache, bias)
        return self.head(self.norm(x[:, -1]))

    def rotations(self, x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position, the sign of the half turn folded into the sines."""
        cos, sin = self.rotary(x, torch.arange(slots, device=x.device)[None])
        half = self.head_dim // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)

    def _layers(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, mask: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = x + self._attend(layer, index, layer.input_norm(x), cos, sin, cache, mask)
            gate, up = _split(layer.gate_up, layer.mlp_norm(x), 2)
            x = x + layer.down(layer.act(gate) * up)
        return x

    def _attend(
        self,
        layer: Layer,
        index: int,
        x: Float[Tensor, "batch new hidden"],
        cos: Tensor,
        sin: Tensor,
        cache: Cache,
        mask: Tensor | None,
    ) -> Float[Tensor, "batch new hidden"]:
        batch, new, _ = x.shape
        joint = torch.cat([part(x) for part in layer.qkv], -1) if len(layer.qkv) > 1 else layer.qkv[0](x)
        turned, v = (
            joint.view(batch, new, -1, self.head_dim).transpose(1, 2).tensor_split([-self.kv_heads], 1)
        )
        if layer.qk_norm is not None:
            turned = layer.qk_norm(turned)
        q, k = _rotate(turned, cos, sin).tensor_split([self.heads], 1)
        keys, values = cache.write(index, k, v)
        group = self.heads // self.kv_heads
        if new == 1:
            # The query heads that share a key head stand in as queries, so no key is ever repeated.
            q = q.reshape(batch, self.kv_heads, group, self.head_dim)
        elif group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=mask)
        mixed = mixed.reshape(batch, 1, -1) if new == 1 else mixed.transpose(1, 2).reshape(batch, new, -1)
        return layer.out(mixed)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([second, first], -1), sin)


def _split(parts: tuple[Linear, ...], x: Tensor, pieces: int) -> Sequence[Tensor]:
    return [part(x) for part in parts] if len(parts) > 1 else parts[0](x).chunk(pieces, -1)


def read(model: PreTrainedModel) -> Decoder:
    """Take the weights of a model that :func:`~opd_lightning.engine.shape.supports` accepted, as they are now."""
    whole: Any = model
    body, config = whole.model, whole.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Decoder(
        embed=body.embed_tokens.weight,
        layers=tuple(_layer(layer, heads, kv_heads) for layer in body.layers),
        norm=_norm(body.norm),
        head=_linear(whole.lm_head),
        rotary=body.rotary_emb,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=body.layers[0].self_attn.head_dim,
    )


def _layer(layer: Any, heads: int, kv_heads: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qk_norm = None
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm, attention.k_norm
        weight = torch.cat([q.weight.expand(heads, 1, -1), k.weight.expand(kv_heads, 1, -1)])
        qk_norm = Norm(weight=weight, eps=q.variance_epsilon)
    return Layer(
        input_norm=_norm(layer.input_layernorm),
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=qk_norm,
        out=_linear(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_fused(mlp.gate_proj, mlp.up_proj),
        down=_linear(mlp.down_proj),
        act=mlp.act_fn,
    )


def _norm(module: Any) -> Norm:
    return Norm(weight=module.weight, eps=module.variance_epsilon)


def _linear(module: Any) -> Linear:
    # Under autocast the products would cast the weights at every step; they are cast once instead.
    dtype = compute_dtype(module.weight)
    bias = None if module.bias is None else module.bias.to(dtype)
    return Linear(weight=module.weight.to(dtype), bias=bias)


def _fused(*modules: Any) -> tuple[Linear, ...]:
    parts = tuple(_linear(module) for module in modules)
    biases = [part.bias for part in parts if part.bias is not None]
    if sum(part.weight.numel() for part in parts) > _FUSE_BELOW or len(biases) not in (0, len(parts)):
        return parts
    bias = torch.cat(biases) if biases else None
    return (Linear(weight=torch.cat([part.weight for part in parts]), bias=bias),)
