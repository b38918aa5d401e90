"""Decoding with two models at once: each token is drawn from what a function makes of both distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opd_lightning.engine.cache import survivors
from opd_lightning.engine.drawn import Record
from opd_lightning.engine.sampling import draw
from opd_lightning.engine.steps import Steps
from opd_lightning.protocols import Combine
from opd_lightning.types import Generation, Sampling


@dataclass(frozen=True, kw_only=True)
class _LibraryState:
    cache: DynamicCache
    mask: Int[Tensor, "batch slots"]
    position: Int[Tensor, " batch"]

    def keep(self, order: Int[Tensor, " kept"]) -> _LibraryState:
        self.cache.batch_select_indices(order)
        return replace(self, mask=self.mask[order], position=self.position[order])


@dataclass(frozen=True)
class Library:
    """Any model of the library, through its own forward and cache."""

    model: PreTrainedModel

    def prefill(
        self, ids: Int[Tensor, "batch prompt"], mask: Bool[Tensor, "batch prompt"], budget: int
    ) -> tuple[Float[Tensor, "batch vocab"], _LibraryState]:
        """Read left-padded prompts; ``budget`` is of no use here, since the cache grows by itself."""
        position = (mask.cumsum(-1) - 1).clamp_(min=0)
        cache = DynamicCache(config=self.model.config.get_text_config())
        state = _LibraryState(cache=cache, mask=mask.long(), position=position[:, -1])
        return self._forward(ids, position, state), state

    def step(
        self, ids: Int[Tensor, " batch"], state: _LibraryState
    ) -> tuple[Float[Tensor, "batch vocab"], _LibraryState]:
        """Read one more token of every row."""
        seen = torch.cat([state.mask, torch.ones_like(state.mask[:, :1])], 1)
        state = replace(state, mask=seen, position=state.position + 1)
        return self._forward(ids[:, None], state.position[:, None], state), state

    def _forward(self, ids: Tensor, position: Tensor, state: _LibraryState) -> Float[Tensor, "batch vocab"]:
        out = self.model(
            input_ids=ids,
            attention_mask=state.mask,
            position_ids=position,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


def decode_mixed(
    models: Sequence[Steps],
    ids: Int[Tensor, "batch prompt"],
    mask: Bool[Tensor, "batch prompt"],
    uniforms: Float[Tensor, "batch time"],
    sampling: Sampling,
    combine: Combine,
) -> Generation:
    """Decode left-padded prompts with the student and the teacher, ``models`` in this order.

    ``combine`` makes one sampler of both models' log-probs over the shared vocabulary at temperature 1;
    temperature, truncation and the seeded draw are then those of every engine. ``behavior_logp`` is under
    the sampler that was drawn from, ``top_ids`` are the student's own.
    """
    record = Record(len(ids), sampling, ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    by_time, plain = uniforms.T.contiguous(), replace(sampling, top_ids=0)
    read = [model.prefill(ids, mask, sampling.max_new_tokens - 1) for model in models]
    for time in range(sampling.max_new_tokens):
        student, teacher = _log_probs([logits for logits, _ in read], sampling.vocab)
        drawn, logp, _ = draw(combine(student, teacher), by_time[time][rows], plain)
        top = student.topk(sampling.top_ids, dim=-1).indices if sampling.top_ids else None
        done = record.write(rows, time, drawn, logp, top)
        left = int((~done).sum())
        if left == 0 or time + 1 == sampling.max_new_tokens:
            break
        states = [state for _, state in read]
        if left < len(rows):
            order = survivors(done, left)
            rows, drawn, states = rows[order], drawn[order], [state.keep(order) for state in states]
        read = [model.step(drawn, state) for model, state in zip(models, states, strict=True)]
    return record.generation()


def _log_probs(logits: Sequence[Tensor], vocab: int | None) -> list[Float[Tensor, "rows vocab"]]:
    """Return log-probs over the shared vocabulary: ``vocab`` ids, or as many as both models have."""
    shared = vocab or min(values.shape[-1] for values in logits)
    return [values[:, :shared].float().log_softmax(-1) for values in logits]
