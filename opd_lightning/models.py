"""Loading causal language models and tokenizers by path or name, and aligning two vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from opd_lightning.errors import ConfigError, require
from opd_lightning.paths import model_path
from opd_lightning.weights import check_weights

PROBES = (
    "Let x = 12.5; then 3*x - 7 = 30.5.",
    "Zoë said:\n\t“naïve”  \\frac{1}{2}",
    "数学 def f(x): return x**2",
)

# What transformers raises for a path, a file or a library that is not what it should be.
_UNLOADABLE = (
    *(OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)

_TOKENIZER = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken")
"""Names of a tokenizer's files."""
_NO_WRITER = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForPreTraining", "ForMultipleChoice")
"""Architectures that see what comes after a token, or have another head. Some of them load all the same."""


def load_model(
    path: str,
    field: str,
    dtype: str = "float32",
    trust: bool = False,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Load a causal language model in ``dtype`` from a folder, a hub name or ``builtin:task/role``.

    Safetensors only. Code that comes with the checkpoint is run where ``trust`` says so, and nowhere else.
    ``quantization`` is how the weights are quantised.

    Raises:
        ConfigError: nothing that transformers can load lies there, weights are missing, it brings code, or its head
            would be quantised.
    """
    load_config(path, field, trust)
    check_dtype(dtype, field.replace("path", "dtype"))
    check_weights(Path(model_path(path)), path, field)
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust}
    if quantization is not None:
        settings["quantization_config"] = quantization
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_path(path), **settings, use_safetensors=True, output_loading_info=True
        )
    except _UNLOADABLE as error:
        raise ConfigError(_sentence(path, field, error)) from error
    model: PreTrainedModel = loaded[0]
    # transformers draws weights that it does not find, and goes on.
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ConfigError(
            f"`{field}` must hold every weight of a {type(model).__name__}, got {path!r} without {len(missing)} of "
            f"them (for example {missing[0]}); check the checkpoint and its config.json"
        )
    head = getattr(model.get_output_embeddings(), "weight", None)
    require(
        head is None or (head.dtype.is_floating_point and not is_traceable_wrapper_subclass(head)),
        field.replace("path", "quantization"),
        "leave the head's weight as it is, which is read row by row",
        type(head).__name__,
        "name the output embedding in modules_to_not_convert, or leave include_input_output_embeddings out",
    )
    return model


def load_config(path: str, field: str, trust: bool = False) -> PreTrainedConfig:
    """Return a model's configuration; no weights are read.

    Raises:
        ConfigError: there is none, it is of no causal language model, or it brings code and no trust.
    """
    _check_folder(path, field)
    remedy = "use false, unless you have read the code and trust it"
    setting = field.removesuffix("path") + "trust_remote_code"
    require(isinstance(trust, bool), setting, "be true or false", trust, remedy)
    try:
        config = AutoConfig.from_pretrained(model_path(path), trust_remote_code=trust)
    except _UNLOADABLE as error:
        raise ConfigError(_sentence(path, field, error)) from error
    kinds = config.architectures or []
    if config.is_encoder_decoder or any(other in kind for kind in kinds for other in _NO_WRITER):
        raise ConfigError(
            f"`{field}` must be a causal language model, got {path!r}, a {', '.join(kinds) or config.model_type}; "
            "choose a decoder, such as Qwen/Qwen3-0.6B"
        )
    return config


def vocabulary_width(path: str, field: str, trust: bool = False) -> int:
    """Return the width of a model's logits from its configuration alone, before its weights are loaded."""
    return int(load_config(path, field, trust).get_text_config().vocab_size)


def empty_model(path: str, field: str, trust: bool = False) -> PreTrainedModel:
    """Return the model at ``path`` without weights (on torch's meta device): shapes and names alone.

    Raises:
        ConfigError: its configuration cannot be read, or is of no causal language model.
    """
    config = load_config(path, field, trust)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)  # type: ignore[no-any-return]
    except _UNLOADABLE as error:
        raise ConfigError(_sentence(path, field, error)) from error


def load_tokenizer(path: str, field: str, trust: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies with a model.

    Raises:
        ConfigError: there is none, or it brings code and no trust.
    """
    _check_folder(path, field)
    folder = Path(model_path(path))
    # transformers makes an empty one for a folder without.
    if folder.is_dir() and not any(file for name in _TOKENIZER for file in folder.glob(name)):
        raise ConfigError(
            f"`{field}` must hold its tokenizer beside the model, got {path!r} without one; copy tokenizer.json and "
            "tokenizer_config.json to it"
        )
    try:
        return AutoTokenizer.from_pretrained(model_path(path), trust_remote_code=trust)
    except _UNLOADABLE as error:
        raise ConfigError(_sentence(path, field, error, "tokenizer")) from error


def check_dtype(dtype: str, field: str) -> None:
    """Refuse a name that is no floating-point type of torch.

    Raises:
        ConfigError: it is not.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    floating = isinstance(named, torch.dtype) and named.is_floating_point
    require(floating, field, "name a floating-point type of torch", dtype, "use float32 or bfloat16")


def _check_folder(path: str, field: str) -> None:
    local = model_path(path)
    looks_local = path.startswith(("builtin:", ".", "/", "~")) or path.count("/") > 1
    if looks_local and not (Path(local) / "config.json").is_file():
        raise ConfigError(
            f"`{field}` must be a folder with a model (config.json, safetensors), got {path!r}; "
            "check the path, or give a hub name such as 'Qwen/Qwen3-0.6B'"
        )


def _sentence(path: str, field: str, error: Exception, what: str = "causal language model") -> str:
    if "trust_remote_code" in str(error):
        owner = field.removesuffix("path")
        return (
            f"`{field}` must name a {what} without code of its own, got {path!r}, which brings some; read its .py "
            f"files and set {owner}trust_remote_code=true, or choose a model that transformers knows"
        )
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"`{field}` must name a {what} that transformers can load, got {path!r}; give a folder with config.json and "
        f"safetensors, or a hub name that this machine can reach or has cached (transformers says: {first})"
    )


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a response: the generation config's, else the tokenizer's."""
    return configured_stops(model.generation_config, tokenizer)


def configured_stops(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Return every id that ends a response: the generation config's, and the tokenizer's."""
    configured = generation.eos_token_id if generation else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return tuple(ids)


def shared_vocabulary(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    widths: tuple[int, int],
    field: str = "teacher.path",
) -> int:
    """Return the width of the vocabulary that two models share, after checking that ids mean the same.

    Tokenizers must give every ordinary token the same id, every added token (a turn's end, a thought tag)
    that both have too, and cut text the same way. Padded widths (151,936 and 152,064 of one tokenizer)
    and added tokens that one alone has may differ; both models are then read up to the smaller width
    (numerics.md, section 7). ``field`` names the second model in errors.

    Raises:
        ConfigError: the tokenizers differ.
    """
    ordinary = [
        {t: i for t, i in tok.get_vocab().items() if i not in tok.added_tokens_decoder}
        for tok in (student, teacher)
    ]
    if ordinary[0] != ordinary[1]:
        every = ordinary[0].keys() | ordinary[1].keys()
        differing = sorted(t for t in every if ordinary[0].get(t) != ordinary[1].get(t))
        token, ids = differing[0], [vocabulary.get(differing[0]) for vocabulary in ordinary]
        raise ConfigError(
            f"`{field}` must have the student's tokenizer, got one in which {len(differing)} ordinary tokens "
            f"differ (for example {token!r}: student id {ids[0]}, its id {ids[1]}); "
            "choose a model of the same family, since log-probs are compared id by id"
        )
    vocabularies = [tok.get_vocab() for tok in (student, teacher)]
    both = vocabularies[0].keys() & vocabularies[1].keys()
    if moved := sorted(t for t in both if vocabularies[0][t] != vocabularies[1][t]):
        ids = [vocabulary[moved[0]] for vocabulary in vocabularies]
        raise ConfigError(
            f"`{field}` must have the student's tokenizer, got one in which {len(moved)} special tokens have "
            f"other ids (for example {moved[0]!r}: student id {ids[0]}, its id {ids[1]}); choose a model of "
            "the same family, or the student would learn to stop at another token"
        )
    for text in PROBES:
        cut = [tok(text, add_special_tokens=False)["input_ids"] for tok in (student, teacher)]
        if cut[0] != cut[1]:
            raise ConfigError(
                f"`{field}` must have the student's tokenizer, got one that cuts {text!r} otherwise "
                f"({len(cut[0])} and {len(cut[1])} tokens); choose a model of the same family"
            )
    return min(widths)
