"""A trainer's processes, as the parts see them."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch
from torch import Tensor

from opd_lightning.world import World


def first_process() -> bool:
    """Return whether this is the first process of a run, as far as whoever started it has said."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID") if name in os.environ), "0")
    return rank == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def started_among_others() -> bool:
    """Return whether torchrun, srun or Lightning has started this process as one of several, or says so."""
    named = ("WORLD_SIZE", "SLURM_NTASKS")
    several = any(os.environ.get(name, "1") not in ("", "1") for name in named)
    return several or os.environ.get("LOCAL_RANK", "0") != "0"


def gathered_objects(trainer: L.Trainer, own: Any) -> list[Any]:
    """Return every process's object in the order of ranks on the first process, this one's alone on the others.

    All processes must call it.
    """
    if trainer.world_size == 1:
        return [own]
    gathered: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(own, gathered, dst=0)
    return [own] if gathered is None else gathered


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
