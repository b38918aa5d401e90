"""Two ways to decode a chunk of prompts; both draw with the same function and write the same record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from opd_lightning.engine.cache import survivors
from opd_lightning.engine.drawn import Record
from opd_lightning.engine.sampling import draw
from opd_lightning.engine.steps import Steps
from opd_lightning.types import Generation, Sampling


def decode(
    decoder: Steps,
    ids: Int[Tensor, "batch prompt"],
    mask: Bool[Tensor, "batch prompt"],
    uniforms: Float[Tensor, "batch time"],
    sampling: Sampling,
) -> Generation:
    """Decode left-padded prompts with the fast decoder; a row leaves the batch at its stop token.

    A row that left never comes back: what is alive is the rows themselves, not a test of the newest token.
    """
    record = Record(len(ids), sampling, ids.device)
    rows = torch.arange(len(ids), device=ids.device)
    by_time = uniforms.T.contiguous()
    logits, state = decoder.prefill(ids, mask, sampling.max_new_tokens - 1)
    for time in range(sampling.max_new_tokens):
        drawn, logp, top = draw(logits, by_time[time][rows], sampling)
        done = record.write(rows, time, drawn, logp, top)
        left = int((~done).sum())
        if left == 0 or time + 1 == sampling.max_new_tokens:
            break
        if left < len(rows):
            order = survivors(done, left)
            rows, drawn, state = rows[order], drawn[order], state.keep(order)
        logits, state = decoder.step(drawn, state)
    return record.generation()


def generate(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch prompt"],
    mask: Bool[Tensor, "batch prompt"],
    uniforms: Float[Tensor, "batch time"],
    sampling: Sampling,
) -> Generation:
    """Decode with the library's ``model.generate``, which runs every model that it knows.

    The token is drawn in a logits processor, which leaves no other id possible; greedy search then takes it.
    """
    library: Any = model
    record = Record(len(ids), sampling, ids.device)
    stops = list(sampling.stop_ids)
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    processors = LogitsProcessorList([_Draw(record, uniforms, sampling)])
    with _own_settings(model, settings):
        library.generate(input_ids=ids, attention_mask=mask.long(), logits_processor=processors)
    return record.generation()


class _Draw(LogitsProcessor):
    """Draws the next token of every row that has not stopped, and writes it down."""

    def __init__(self, record: Record, uniforms: Float[Tensor, "batch time"], sampling: Sampling) -> None:
        self.record, self.uniforms, self.sampling = record, uniforms, sampling
        self.time = 0
        self.alive = torch.ones(len(uniforms), dtype=torch.bool, device=uniforms.device)

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Return scores in which only the drawn id is finite."""
        drawn, logp, top = draw(scores, self.uniforms[:, self.time], self.sampling)
        rows = self.alive.nonzero()[:, 0]
        done = self.record.write(rows, self.time, drawn[rows], logp[rows], None if top is None else top[rows])
        self.alive[rows] = ~done
        self.time += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)


@contextmanager
def _own_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    # Settings that a model carries (penalties, forced tokens, its own stop ids) fill what a call leaves open.
    held = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = held
