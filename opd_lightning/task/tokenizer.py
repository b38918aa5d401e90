"""The built-in task's tokenizer: a small byte-level BPE, trained on generated problems."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_lightning.types import Problem

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THOUGHT = ("<think>", "</think>")

# Qwen's pattern, with a digit a token of its own: the model adds column by column, as on paper.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(problems: Iterable[Problem], *, size: int = 512) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the texts of ``problems``, with the ChatML template.

    Ids 0 to 4 are the padding, start-of-turn, end-of-turn (the stop token), ``<think>`` and
    ``</think>``. The last two are ordinary text to ``decode(skip_special_tokens=True)``, since a grader
    looks for them.

    Args:
        problems: with gold responses; the same problems give the same tokenizer.
        size: most entries; templated text has fewer words than that, so the result is often smaller.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    added += [AddedToken(token, special=False, normalized=False) for token in THOUGHT]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_text(problem) for problem in problems), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_plain_thoughts(tokenizer),
        chat_template=CHATML,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def padded_size(tokenizer: PreTrainedTokenizerFast, multiple: int = 16) -> int:
    """Return the vocabulary's size rounded up, so that a model's matrices have round shapes."""
    return -(-len(tokenizer) // multiple) * multiple


def _text(problem: Problem) -> str:
    turns = "\n".join(str(message["content"]) for message in problem.messages)
    return f"user\n{turns}\nassistant\n{problem.response}"


def _with_plain_thoughts(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with the thought marks no longer special, as the trainer makes all of them so."""
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in THOUGHT
    return Tokenizer.from_str(json.dumps(state))
