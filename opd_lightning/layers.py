"""What is done to a loaded model: layers compiled or computed again, weights by name, modes inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from opd_lightning.errors import require


def check_compiled(compiled: object) -> None:
    """Raise ConfigError for a switch that is neither on nor off."""
    require(isinstance(compiled, bool), "student.compile", "be true or false", compiled, "use false")


def check_checkpointing(wanted: object) -> None:
    """Raise ConfigError for a switch that is neither on nor off."""
    remedy = "use true to compute the layers twice and keep less"
    require(isinstance(wanted, bool), "student.gradient_checkpointing", "be true or false", wanted, remedy)


def checkpoint_layers(model: PreTrainedModel, path: str) -> None:
    """Have a backward pass compute each layer again from what went in; nothing changes where nothing is learnt.

    Raises:
        ConfigError: the model has no such switch.
    """
    remedy = "use false, or a smaller collector.micro_batch_tokens"
    can = bool(model.supports_gradient_checkpointing)
    require(can, "student.gradient_checkpointing", f"be false for {type(model).__name__}", path, remedy)
    # Not reentrant: a layer of trained adapters alone learns too, and hooks of FSDP run as they should.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return a model's decoder layers: the members of its longest module list."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and saved buffer under each name that it has: a tied head too, beside the embedding."""
    # Not state_dict(): under FSDP2 it would shard again what is gathered just now.
    yield from model.named_parameters(remove_duplicate=False)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def mark_sharded(model: nn.Module) -> None:
    """Remember that every call of ``model`` gathers weights, by all processes together."""
    model.__dict__["_weights_are_sharded"] = True


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of ``model`` are spread over processes, gathered just now or not."""
    marked = model.__dict__.get("_weights_are_sharded", False)
    return marked or any(isinstance(module, FSDPModule) for module in model.modules())


def compile_layers(model: nn.Module) -> None:
    """Have torch.compile run each decoder layer, in place: names and classes of all modules stay.

    All layers are one function, which is compiled once for training and once without gradient, with lengths
    left open. It happens at the first call.
    """
    for layer in repeated_layers(model):
        layer.compile(dynamic=True)


def eager(model: nn.Module) -> AbstractContextManager[None]:
    """Run ``model`` as it is written inside the block, whether it was compiled or not.

    For generation: every step has a cache of another length, and what each is compiled for is used once.
    """
    if not any(layer._compiled_call_impl is not None for layer in repeated_layers(model)):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def compute_dtype(of: Tensor | PreTrainedModel) -> torch.dtype:
    """Return the dtype of a model's products, or of products with a tensor: under autocast not its own."""
    kind = of.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else of.dtype


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold every module of ``model`` in evaluation mode; modules that were so before stay so after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
