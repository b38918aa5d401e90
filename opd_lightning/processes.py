"""A trainer's processes, as the parts see them."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from opd_lightning.world import World


def world_of(trainer: L.Trainer) -> World:
    """Return this process among the trainer's."""
    strategy, size = trainer.strategy, trainer.world_size

    def total(tensor: Tensor) -> Tensor:
        summed = strategy.reduce(tensor.clone(), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed

    def gather(values: Tensor) -> Tensor:
        if size == 1:
            return values
        # Ranks may differ in length, and a gathering needs one shape: pad, then cut by the counts.
        counts = strategy.all_gather(torch.tensor(len(values), device=strategy.root_device))
        padded = values.new_zeros(int(counts.max()))
        padded[: len(values)] = values
        rows = strategy.all_gather(padded.to(strategy.root_device))
        return torch.cat([row[: int(n)] for row, n in zip(rows, counts, strict=True)]).to(values.device)

    return World(trainer.global_rank, size, total, gather)
