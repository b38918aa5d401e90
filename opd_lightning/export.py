"""Saving the trained student in Hugging Face form, whatever the strategy."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import lightning as L
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.layers import named_weights
from opd_lightning.lora import adapted, merged, save_adapter
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.sharding import unsharded


def save_student(
    trainer: L.Trainer, module: OnPolicyDistillation, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write model, generation config and tokenizer to ``folder`` on the first process.

    Adapters are merged into the written weights, and written by themselves to ``folder/adapter`` too.
    Sharded parameters are gathered as for a collection, so that all processes must call it.
    """
    model = module.scorer.model
    with unsharded(module.scorer):
        if trainer.is_global_zero:
            state = _state(model)
            if adapted(model):
                save_adapter(model, state, folder / "adapter")
                state = merged(model, state)
            with system_errors(folder):
                model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def system_errors(folder: Path | str) -> Iterator[None]:
    """Raise what the system said, such as that a disk is full, in place of what safetensors makes of it.

    Raises:
        OSError: the system refused a file in ``folder``.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return every weight on the CPU by its name; names that are tied share one tensor, to be written once."""
    named = dict(named_weights(model))
    whole: dict[Tensor, Tensor] = {tensor: tensor.detach().cpu() for tensor in dict.fromkeys(named.values())}
    return {name: whole[tensor] for name, tensor in named.items()}
