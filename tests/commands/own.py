"""Models and problems of a user's own: tiny, random, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.paths import model_path

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}

SUMS = [
    {"prompt": f"What is {a}+{b}? Put the answer in \\boxed{{}}.", "answer": str(a + b)}
    for a, b in ((2, 3), (7, 4), (6, 2), (9, 3), (1, 8), (5, 5))
]
"""Rows with answers."""


def shipped_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer that comes with the package."""
    return AutoTokenizer.from_pretrained(model_path("builtin:word_problems/student"))


def save_model(
    folder: Path,
    family: str = "qwen3",
    *,
    seed: int = 0,
    vocab: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **more: Any,
) -> Path:
    """Save a random two-layer model with its tokenizer, the shipped one; ``vocab`` pads the model's own width."""
    tokenizer = tokenizer or shipped_tokenizer()
    kind, model = FAMILIES[family]
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab or len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model(kind(**sizes | more)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
