"""A frozen model whose weights are spread over the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from opd_lightning.layers import is_sharded
from opd_lightning.loading import FrozenScorer
from opd_lightning.sharding import shard


@dataclass(frozen=True)
class ShardedScorer(FrozenScorer):
    """A frozen scorer of which each process holds a part, gathered layer by layer in each forward (FSDP2).

    All processes must call it equally often, whatever their tokens. Its head is whole inside its forward alone.
    """

    def to(self, device: torch.device | str) -> ShardedScorer:
        """Spread the weights over the devices of all processes, once; one process alone has them whole."""
        if is_sharded(self.scorer.model):
            return self
        if not dist.is_initialized() or dist.get_world_size() == 1:
            super().to(device)
            return self
        # One layer after the other goes to its device and is cut there. The teacher has a mesh of its own,
        # whatever the student's strategy.
        shard(self.scorer, init_device_mesh(torch.device(device).type, (dist.get_world_size(),)))
        # FSDP2 would keep embedding and head for a backward pass, which a teacher does not have.
        self.scorer.set_reshard_after_forward(True, recurse=False)  # type: ignore[operator]
        return self

    def placed(self, processes: int) -> str:
        """Say where the weights lie among so many processes, for people."""
        if processes == 1:
            return "whole: teacher.shard=true does nothing with one process"
        return f"sharded over {processes} processes"
