"""A student whose weights are spread over processes: how it is cut, and gathered once for a whole collection.

Three ways to cut: FSDP2 (``fully_shard``), FSDP1 (``FullyShardedDataParallel``) and DeepSpeed's ZeRO-3. In each
the scorer is the root that a training step calls, so that a head read inside its forward is whole, tied or not.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy

from opd_lightning.layers import mark_sharded, repeated_layers
from opd_lightning.scorer import Scorer
from opd_lightning.types import Scores, TokenBatch, Want


def decoder_layers(scorer: Scorer) -> list[nn.Module]:
    """Return the model's repeated layers."""
    return repeated_layers(scorer.model)


def shard(scorer: Scorer, mesh: DeviceMesh) -> None:
    """Shard each decoder layer by FSDP2, and the rest (embedding, norm, head) with the scorer as the root."""
    for layer in decoder_layers(scorer):
        fully_shard(layer, mesh=mesh)
    fully_shard(scorer, mesh=mesh)
    mark_sharded(scorer.model)


def wrap(scorer: Scorer, device: torch.device) -> FullyShardedDataParallel:
    """Shard each decoder layer by FSDP1, and the rest in the wrapper that is returned, which is to be called.

    No precision is given to it: autocast decides what is computed in, as under DDP, and gradients are summed
    in the parameters' own type.
    """
    layers = set(decoder_layers(scorer))
    root = FullyShardedDataParallel(
        scorer,
        auto_wrap_policy=CustomPolicy(lambda module: module in layers),
        device_id=device,
        use_orig_params=True,
    )
    # Not registered: the wrapper holds the scorer, which only has to find it.
    scorer.__dict__["_wrapper"] = root
    mark_sharded(scorer.model)
    return root


def partitioned(scorer: Scorer) -> None:
    """Have ZeRO-3, whose hooks are on ``scorer`` by now, hold the head whole wherever the scorer reads it.

    Its hooks gather what a module owns, when that is called: the head is read and not called. And they go
    by the tensors that a forward returns, in tuples and dicts: :func:`scores_of` turns them into Scores again.
    """
    import deepspeed

    head = scorer.model.get_output_embeddings()
    for parameter in head.parameters():
        deepspeed.zero.register_external_parameter(scorer, parameter)
    # Before DeepSpeed's own, which looks for the tensors whose backward needs the weights again.
    scorer.register_forward_hook(_as_dict, prepend=True)
    mark_sharded(scorer.model)


def _as_dict(scorer: nn.Module, given: Any, scores: Scores) -> dict[str, Any] | Scores:
    if not torch.is_grad_enabled():
        return scores
    return {name: value for name, value in vars(scores).items() if value is not None}


def scores_of(given: Scores | dict[str, Any]) -> Scores:
    """Return a scorer's answer, whatever the strategy's hooks made of it."""
    return Scores(**given) if isinstance(given, dict) else given


def scorer_of(student: nn.Module) -> Scorer:
    """Return the scorer behind a strategy's wrapper."""
    scorer = student.module if isinstance(student, FullyShardedDataParallel) else student
    assert isinstance(scorer, Scorer)
    return scorer


@contextlib.contextmanager
def unsharded(scorer: Scorer) -> Iterator[None]:
    """Hold a scorer's parameters whole inside the block, without gradient; nothing happens to one not sharded.

    Generation then gathers once a collection and not once a token. Every rank must enter and leave.
    """
    wrapper = scorer.__dict__.get("_wrapper")
    if wrapper is not None:
        whole = _unwrapped(wrapper)
    elif any(hasattr(parameter, "ds_id") for parameter in scorer.parameters()):
        whole = _gathered(scorer)
    elif any(isinstance(module, FSDPModule) for module in scorer.modules()):
        whole = _resharded(scorer)
    else:
        yield
        return
    # Lightning evaluates in inference mode, and what is gathered first in that mode can never be trained.
    with torch.inference_mode(False), torch.no_grad(), whole:
        yield


@contextlib.contextmanager
def _resharded(scorer: Scorer) -> Iterator[None]:
    """FSDP2: gather every group, and let no forward inside the block free it."""
    modules = [m for m in scorer.modules() if isinstance(m, FSDPModule)]
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


@contextlib.contextmanager
def _unwrapped(root: FullyShardedDataParallel) -> Iterator[None]:
    """FSDP1: gather everything, and take the inner wrappers out, which no forward may enter meanwhile."""
    places = [
        (parent, name, child)
        for parent in root.module.modules()
        for name, child in parent._modules.items()
        if isinstance(child, FullyShardedDataParallel)
    ]
    with FullyShardedDataParallel.summon_full_params(root, writeback=False):
        for parent, name, child in places:
            parent._modules[name] = child.module
        try:
            yield
        finally:
            for parent, name, child in places:
                parent._modules[name] = child


@contextlib.contextmanager
def _gathered(scorer: Scorer) -> Iterator[None]:
    """ZeRO-3: gather everything, without the hooks that would free each layer after its forward."""
    import deepspeed

    kinds = ("_forward_pre_hooks", "_forward_hooks")
    kept = [(module, kind, getattr(module, kind)) for module in scorer.modules() for kind in kinds]
    with deepspeed.zero.GatheredParameters(list(scorer.parameters()), modifier_rank=None):
        for module, kind, hooks in kept:
            others = {key: hook for key, hook in hooks.items() if not _is_deepspeeds(hook)}
            setattr(module, kind, OrderedDict(others))
        try:
            yield
        finally:
            for module, kind, hooks in kept:
                setattr(module, kind, hooks)


def _is_deepspeeds(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def total_norm(student: nn.Module) -> Tensor:
    """Return the L2 norm of the gradient of all parameters, before it is clipped, over every rank's share."""
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    if isinstance(student, FullyShardedDataParallel):
        device = next(student.parameters()).device
        squares = torch.zeros((), device=device)
        for gradient in gradients:
            squares += gradient.float().square().sum()
        if student.world_size > 1:  # alone, FSDP1 does not shard
            dist.all_reduce(squares, group=student.process_group)
        return squares.sqrt()
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
