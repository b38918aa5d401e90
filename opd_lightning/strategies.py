"""Lightning strategies that need more than a name."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from opd_lightning.errors import require


def fsdp(devices: int | str, num_nodes: int) -> ModelParallelStrategy:
    """Return FSDP2 over all processes: ``devices * num_nodes`` shards, one checkpoint file."""
    local = torch.cuda.device_count() if devices in ("auto", -1) else devices
    require(
        isinstance(local, int) and local >= 1,
        "trainer.devices",
        "be a number with strategy=fsdp",
        devices,
        "use trainer.devices=8",
    )
    return ModelParallelStrategy(
        data_parallel_size=int(local) * num_nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
