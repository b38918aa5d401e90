"""Saving the trained student in Hugging Face form, whatever the strategy."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.lora import adapted, merged, save_adapter
from opd_lightning.module import OnPolicyDistillation


def save_student(
    trainer: L.Trainer, module: OnPolicyDistillation, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write model, generation config and tokenizer to ``folder`` on the first process.

    Adapters are merged into the written weights, and written by themselves to ``folder/adapter`` too.
    Sharded parameters are gathered by every process, so that all must call it, and held by the first.
    """
    model = module.student.model
    parameters = model.state_dict(keep_vars=True)
    # Tied names share one parameter: it is gathered once and stays one tensor, which is then written once.
    whole: dict[Tensor, Tensor] = {}
    for parameter in dict.fromkeys(parameters.values()):
        gathered = _whole(parameter)
        if trainer.is_global_zero:
            whole[parameter] = gathered
    if trainer.is_global_zero:
        state = {name: whole[p] for name, p in parameters.items()}
        if adapted(model):
            save_adapter(model, folder / "adapter")
            state = merged(model, state)
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def _whole(value: Tensor) -> Tensor:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().cpu()
