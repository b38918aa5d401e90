"""How rows of different lengths go through a backbone: padded together, in groups of like length, or packed.

A causal model needs no attention mask over padding on the right, so that layouts differ in how many tokens
are computed for nothing and in the number of calls alone; the states that are read are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_lightning.errors import ConfigError, require
from opd_lightning.layers import is_sharded
from opd_lightning.types import TokenBatch

LAYOUTS = ("auto", "padded", "buckets", "packed")

CALL_WORK = {"cpu": 2e7, "cuda": 6e10}
"""Floating-point operations that a device does in the time that the call of a layer costs by itself.

So much is gained at least where one group of rows is cut into two (:func:`buckets`). The CPU's number is
measured (benchmarks/layouts.py); CUDA's is an estimate, 0.4 ms at 150 TFLOP/s.
"""


_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def check_layout(layout: str, field: str = "student.layout") -> None:
    """Raise ConfigError for a name that is no layout."""
    require(layout in LAYOUTS, field, f"be one of {', '.join(LAYOUTS)}", layout, "use auto")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Sequences moved to the left.

    ``lengths`` counts the tokens that are computed: the last one of a response predicts nothing that is
    scored, and of a row without a response a single token is left, to keep its place.
    """

    ids: Int[Tensor, "batch length"]
    starts: Int[Tensor, " batch"]
    lengths: Int[Tensor, " batch"]
    tokens: TokenBatch

    @classmethod
    def of(cls, tokens: TokenBatch) -> Rows:
        """Return the rows of a batch."""
        ids = torch.cat([tokens.prompt_ids, tokens.ids], -1)
        exists = torch.cat([tokens.prompt_mask, tokens.mask], -1)
        order = torch.argsort(exists.logical_not(), dim=-1, stable=True)
        starts, responses = tokens.prompt_mask.sum(-1), tokens.mask.sum(-1)
        lengths = torch.where(responses > 0, starts + responses - 1, 1)
        return cls(ids=ids.gather(-1, order), starts=starts, lengths=lengths, tokens=tokens)

    def predicting(self, offsets: Int[Tensor, " batch"]) -> Int[Tensor, " n"]:
        """Return where the state lies that predicts each response token, if row r begins at ``offsets[r]``."""
        row, column = torch.where(self.tokens.mask)
        nth = (self.tokens.mask.cumsum(-1) - 1)[row, column]
        return offsets[row] + self.starts[row] - 1 + nth


def last_states(model: PreTrainedModel, tokens: TokenBatch, layout: str) -> Float[Tensor, "n hidden"]:
    """Return the last hidden state that predicts each response token, in the order of ``tokens.mask``.

    Args:
        model: its ``base_model`` is called.
        tokens: prompts padded on the left, responses on the right.
        layout: one of :data:`LAYOUTS`.
    """
    rows, chosen = Rows.of(tokens), choose(layout, model)
    if chosen == "packed":
        states, offsets = _packed(model.base_model, rows)
    else:
        call = call_tokens(model, rows.ids.device) if chosen == "buckets" else math.inf
        states, offsets = _grouped(model.base_model, rows, buckets(rows.lengths.tolist(), call))
    return states.index_select(0, rows.predicting(offsets))


def choose(layout: str, model: PreTrainedModel) -> str:
    """Return the layout that is used: ``padded``, ``buckets`` or ``packed``.

    ``auto`` is packed under flash attention, which computes no block off the diagonal, and buckets elsewhere.
    Sharded weights are gathered anew in each call, by all ranks together, and their numbers of groups
    differ: buckets are then one group.
    """
    if layout == "auto":
        layout = "packed" if _flash(model) else "buckets"
    return "padded" if layout == "buckets" and is_sharded(model) else layout


def buckets(lengths: Sequence[int], call: float) -> list[list[int]]:
    """Return groups of rows of like length, the shortest first, rows in their order: the cheapest of all cuts.

    cost = sum over groups of (rows * longest row + call)

    found exactly, by dynamic programming over the distinct lengths in ascending order.

    Args:
        lengths: tokens of each row.
        call: what a group costs beside its tokens, in tokens; infinite for a single group.
    """
    if math.isinf(call):
        return [list(range(len(lengths)))]
    width, count = np.unique(np.asarray(lengths), return_counts=True)
    rows = np.concatenate([[0], np.cumsum(count)])
    best, begin = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
    for end in range(1, len(rows)):
        costs = best[:end] + width[end - 1] * (rows[end] - rows[:end]) + call
        begin[end] = int(np.argmin(costs))
        best[end] = costs[begin[end]]
    order = np.argsort(np.asarray(lengths), kind="stable")
    groups, end = [], len(rows) - 1
    while end > 0:
        groups.append(sorted(order[rows[begin[end]] : rows[end]].tolist()))
        end = begin[end]
    return groups[::-1]


def call_tokens(model: PreTrainedModel, device: torch.device) -> float:
    """Return what a call of the backbone costs by itself, in tokens: ``CALL_WORK / (2 * weights of a layer)``."""
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())
    weights = sum(p.numel() for p in model.base_model.parameters()) - embedding
    return CALL_WORK.get(device.type, CALL_WORK["cuda"]) * layers / (2 * max(weights, 1))


def _grouped(
    backbone: nn.Module, rows: Rows, groups: Sequence[list[int]]
) -> tuple[Float[Tensor, "all hidden"], Int[Tensor, " batch"]]:
    """Return all states of a call for each group, and where each row begins in them."""
    lengths, parts, begin = rows.lengths.tolist(), [], 0
    offsets = [0] * len(lengths)
    for group in groups:
        width = max(lengths[row] for row in group)
        for row in group:
            offsets[row], begin = begin, begin + width
        index = torch.tensor(group, device=rows.ids.device)
        parts.append(_states(backbone, rows.ids[index, :width]))
    return torch.cat(parts) if len(parts) > 1 else parts[0], torch.tensor(offsets, device=rows.ids.device)


def _packed(backbone: nn.Module, rows: Rows) -> tuple[Float[Tensor, "all hidden"], Int[Tensor, " batch"]]:
    """Return all states of one row without padding, and where each row begins in it.

    From position ids that begin again transformers knows the sequences: it masks the blocks off the
    diagonal under sdpa and eager attention, and leaves them out under flash attention.
    """
    place = torch.arange(rows.ids.shape[1], device=rows.ids.device).expand_as(rows.ids)
    computed = place < rows.lengths.unsqueeze(-1)
    ids, position = rows.ids[computed].unsqueeze(0), place[computed].unsqueeze(0)
    return _states(backbone, ids, position_ids=position), rows.lengths.cumsum(0) - rows.lengths


def _states(backbone: nn.Module, ids: Tensor, **more: Tensor) -> Float[Tensor, "all hidden"]:
    states: Tensor = backbone(input_ids=ids, use_cache=False, **more)[0]
    return states.flatten(0, 1)


def _flash(model: PreTrainedModel) -> bool:
    """Return whether flash attention is all that mixes tokens; a recurrence would run on into the next row."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    attends = not model._is_stateful and all(kind in _ATTENTION for kind in kinds)
    return attends and "flash" in str(model.config._attn_implementation)


@torch.no_grad()
def check_packed(model: PreTrainedModel, layout: str, path: str) -> None:
    """Refuse ``packed`` for a model in which one sequence of a packed row reaches the next.

    Raises:
        ConfigError: two packed rows give other states than they give padded.
    """
    if layout != "packed":
        return
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 17, device=model.device).reshape(2, 8) % vocab
    lengths = torch.tensor([[8], [5]], device=ids.device)
    mask = torch.arange(7, device=ids.device) < lengths - 1
    whole = torch.ones_like(ids[:, :1], dtype=torch.bool)
    tokens = TokenBatch(prompt_ids=ids[:, :1], prompt_mask=whole, ids=ids[:, 1:], mask=mask)
    try:
        one, other = (last_states(model, tokens, name).float() for name in ("packed", "padded"))
        same = bool((one - other).abs().amax() <= torch.finfo(model.dtype).eps ** 0.5 * other.abs().amax())
    except TypeError:
        same = False
    if not same:
        raise ConfigError(
            f"`student.layout` must be auto, buckets or padded for {path!r} ({type(model).__name__}), in which "
            "sequences that are packed into one row reach each other, got 'packed'; use auto"
        )
