"""Cutting an optimizer step into micro-batches without changing its loss."""

from __future__ import annotations

from dataclasses import replace

import torch

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
    ends = torch.cumsum(tokens[order], 0)
    # Row r goes to the micro-batch in which the middle of its tokens falls, as far as each then has a row.
    middle = ends - tokens[order] / 2
    place = torch.arange(len(order), device=order.device)
    bins = (middle * count / ends[-1].clamp(min=1)).long()
    bins = torch.maximum(torch.minimum(bins, place), count - len(order) + place).clamp(0, count - 1)
    parts = [experience.rows(order[bins == i]) for i in range(count)]
    return [part if len(part.share) else empty(experience) for part in parts]


def empty(experience: Experience) -> Experience:
    """Return a micro-batch whose loss is 0 with a graph: the first row, without a share in the loss."""
    row = experience.rows([0])
    return replace(row, share=torch.zeros_like(row.share))
