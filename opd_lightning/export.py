"""Saving the trained student in Hugging Face form, whatever the strategy."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.module import OnPolicyDistillation


def save_student(
    trainer: L.Trainer, module: OnPolicyDistillation, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write model, generation config and tokenizer to ``folder`` on the first process.

    Sharded parameters are gathered on every process, so that all must call it.
    """
    model = module.student.model
    state = {name: _whole(value) for name, value in model.state_dict().items()}
    if trainer.is_global_zero:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def _whole(value: Tensor) -> Tensor:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().cpu()
