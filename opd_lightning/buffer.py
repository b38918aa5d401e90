"""Cutting an optimizer step into micro-batches without changing its loss."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.types import Experience


def micro_batches(experience: Experience, count: int) -> list[Experience]:
    """Cut one optimizer step's rows into exactly ``count`` micro-batches of about equal token counts.

    Rows are sorted by length, so that rows padded together are alike. With fewer rows than ``count`` the
    rest are empty: one row with no share in the loss, so that every rank runs as many backward passes.
    Shares were counted over the whole step, so the sum of the parts' losses does not depend on the cut.

    Raises:
        ConfigError: ``count`` below 1.
    """
    require(
        count >= 1, "trainer.accumulate_grad_batches", "be at least 1", count, "use 1 for no accumulation"
    )
    rollout = experience.rollout
    tokens = rollout.prompt.mask.sum(-1) + rollout.lengths
    order = torch.argsort(tokens, stable=True)
    ordered, place = tokens[order], torch.arange(len(order), device=order.device)
    # As many rows in each are a cut too, whose largest part is bounded: that of the shorter largest part.
    cuts = _by_tokens(ordered, count), place * count // len(order) if len(order) > count else place
    bins = min(cuts, key=lambda cut: _largest(ordered, cut))
    parts = [experience.rows(order[bins == i]) for i in range(count)]
    return [part if len(part.share) else empty(experience) for part in parts]


def _by_tokens(ordered: Int[Tensor, " rows"], count: int) -> Int[Tensor, " rows"]:
    """Return for each row the micro-batch in which the middle of its tokens falls, as far as each then has a row."""
    ends, place = torch.cumsum(ordered, 0), torch.arange(len(ordered), device=ordered.device)
    bins = ((ends - ordered / 2) * count / ends[-1].clamp(min=1)).long()
    return torch.maximum(torch.minimum(bins, place), count - len(ordered) + place).clamp(0, count - 1)


def _largest(ordered: Int[Tensor, " rows"], bins: Int[Tensor, " rows"]) -> int:
    """Return the tokens of the largest micro-batch, padding included."""
    return max(int(ordered[bins == i].amax() * (bins == i).sum()) for i in bins.unique().tolist())


def micro_batch_count(rows: int, longest: int, budget: int) -> int:
    """Return how many micro-batches keep each within ``budget`` tokens, padding included, however long its rows.

    count = ceil(rows / floor(budget / longest))

    ``budget / longest`` rows fit at their longest; with as many in each no micro-batch is over the budget,
    and :func:`micro_batches` cuts no worse than that.

    Raises:
        ConfigError: a budget below one row of ``longest`` tokens.
    """
    require(
        isinstance(budget, int) and not isinstance(budget, bool) and budget >= longest,
        "collector.micro_batch_tokens",
        f"hold the longest prompt with the longest response, {longest} tokens",
        budget,
        f"use at least {longest}, or lower collector.max_prompt_tokens or rollout.max_new_tokens",
    )
    return -(-rows // (budget // longest))


def check_one_count(accumulate: int, budget: int | None) -> None:
    """Refuse a number of micro-batches beside a budget of tokens that decides on it."""
    require(
        accumulate == 1 or budget is None,
        "trainer.accumulate_grad_batches",
        f"be 1 with collector.micro_batch_tokens={budget}, which decides how many micro-batches a step has",
        accumulate,
        "leave one of the two out",
    )


def empty(experience: Experience) -> Experience:
    """Return a micro-batch whose loss is 0 with a graph: the first row, without a share in the loss."""
    row = experience.rows([0])
    return replace(row, share=torch.zeros_like(row.share))
