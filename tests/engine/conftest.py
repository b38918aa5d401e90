"""Tiny random models of several families, and ragged prompts for them."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd_lightning.types import Problem, PromptBatch

VOCAB = 40
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 8}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 8}),
}


def build(family: str, **changes):
    """Weights drawn wide enough that greedy text varies from row to row."""
    model_class, config_class, settings = FAMILIES[family]
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    torch.manual_seed(3)
    model = model_class(config_class(**{**common, **settings, **changes}))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # biases and norms start as 0 and 1, where an error would not show
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


@pytest.fixture
def make():
    """The builder, for models with a feature of their own."""
    return build


@pytest.fixture(scope="module")
def qwen3():
    return build("qwen3")


def ragged(lengths=(3, 9, 1, 14, 6, 6, 11), seed=0) -> PromptBatch:
    """Left-padded random prompts; a padding id is arbitrary, so it is not always 0."""
    width, generator = max(lengths), torch.Generator().manual_seed(seed)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    ids = torch.randint(0, VOCAB, mask.shape, generator=generator)
    problems = tuple(Problem(index=i, messages=()) for i in range(len(lengths)))
    return PromptBatch(
        ids=ids, mask=mask, problems=problems, seeds=tuple(1000 + i for i in range(len(lengths)))
    )


@pytest.fixture
def prompts():
    return ragged()
