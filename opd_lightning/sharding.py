"""FSDP2 for a scorer: shard its decoder layers, and gather them once for a whole collection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from opd_lightning.models import repeated_layers
from opd_lightning.scorer import Scorer
from opd_lightning.types import TokenBatch, Want


def decoder_layers(scorer: Scorer) -> list[nn.Module]:
    """Return the model's repeated layers."""
    return repeated_layers(scorer.model)


def shard(scorer: Scorer, mesh: DeviceMesh) -> None:
    """Shard each decoder layer, and the rest (embedding, norm, head) with the scorer as the root.

    The root is what ``training_step`` calls, so that a head read inside its forward is whole, tied or not.
    """
    for layer in decoder_layers(scorer):
        fully_shard(layer, mesh=mesh)
    fully_shard(scorer, mesh=mesh)


@contextlib.contextmanager
def unsharded(scorer: Scorer) -> Iterator[None]:
    """Hold a scorer's parameters whole inside the block, without gradient; nothing happens to one not sharded.

    Generation then gathers once a collection and not once a token. Every rank must enter and leave.
    """
    modules = [m for m in scorer.modules() if isinstance(m, FSDPModule)]
    if not modules:
        yield
        return
    # Lightning evaluates in inference mode, and what is gathered first in that mode can never be trained.
    with torch.inference_mode(False), torch.no_grad():
        _first_forward(scorer)
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(module is not scorer, recurse=False)
                module.reshard()


@torch.no_grad()
def _first_forward(scorer: Scorer) -> None:
    """Run one token through the root: FSDP2 takes as its root the module whose forward runs first."""
    if getattr(scorer, "_root_is_known", False):
        return
    device = scorer.device
    one = torch.ones(1, 1, dtype=torch.long, device=device)
    scorer(TokenBatch(prompt_ids=one, prompt_mask=one.bool(), ids=one, mask=one.bool()), Want(taken=True))
    scorer.__dict__["_root_is_known"] = True
