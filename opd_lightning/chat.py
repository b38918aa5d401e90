"""Chat messages to token ids, and rows of ids to a left-padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.errors import ConfigError


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the ids of a prompt: the chat template with a generation prompt, or the plain text without one.

    Raises:
        ConfigError: the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        text = "\n\n".join(str(m["content"]) for m in messages)
        return list(tokenizer(text)["input_ids"])
    given = [dict(m) for m in messages]
    try:
        ids = tokenizer.apply_chat_template(
            given, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise ConfigError(
            f"`messages` must be what the student's chat template takes, got {given!r:.120} ({error}); "
            "change the rows, or the chat template beside the tokenizer"
        ) from error
    return list(ids)


def left_padded(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "batch prompt"], Bool[Tensor, "batch prompt"]]:
    """Return the rows moved to the right end of the longest one's width, and where tokens exist."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, prompt in enumerate(rows):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    return ids, mask
