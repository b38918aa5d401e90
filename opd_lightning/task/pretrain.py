"""Training the built-in teacher and student from nothing, by cross-entropy on gold responses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opd_lightning.task.tokenizer import padded_size
from opd_lightning.types import Problem

_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of a model: a Qwen3 decoder with grouped-query attention and tied embeddings."""

    hidden: int
    layers: int
    feed_forward: int
    heads: int
    key_value_heads: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training: ``steps`` updates on ``batch`` problems of ``min_steps`` to ``max_steps`` steps.

    The learning rate warms up over ``warmup`` updates and falls on a line to ``final`` of itself.
    """

    min_steps: int
    max_steps: int
    batch: int
    steps: int
    learning_rate: float
    warmup: int
    final: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training stands: updates done in this phase, the last loss, seconds since the beginning."""

    phase: int
    step: int
    loss: float
    tokens: int
    seconds: float


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return a random model; its vocabulary is the tokenizer's, padded to a multiple of 16."""
    torch.manual_seed(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen3Config(
        vocab_size=padded_size(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Callable[[Phase], Sequence[Problem]],
    phases: Sequence[Phase],
    report: Callable[[Progress], bool],
) -> None:
    """Train ``model`` in place through ``phases``; stop when ``report`` returns True.

    Loss: cross-entropy of the response tokens, the stop token included, mean over the batch's tokens;
    AdamW with betas (0.9, 0.95), weight decay 0.01, gradient norm clipped at 1.
    """
    begun, tokens = time.perf_counter(), 0
    for number, phase in enumerate(phases):
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, phase))
        for step, (ids, labels) in enumerate(_batches(tokenizer, problems(phase), phase), 1):
            model.train()
            loss = response_loss(model, ids, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            tokens += int((labels != _IGNORED).sum())
            seconds = time.perf_counter() - begun
            if report(Progress(phase=number, step=step, loss=loss.item(), tokens=tokens, seconds=seconds)):
                return


def response_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labelled tokens; only their positions reach the head."""
    hidden = model.base_model(input_ids=ids, use_cache=False)[0][:, :-1]
    targets = labels[:, 1:]
    inside = targets != _IGNORED
    return F.cross_entropy(model.get_output_embeddings()(hidden[inside]), targets[inside])


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint that transformers loads, tokenizer included."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rate(phase: Phase, step: int) -> float:
    done = min(step / phase.steps, 1.0)
    return min((step + 1) / max(phase.warmup, 1), 1.0) * (1 - (1 - phase.final) * done)


def _batches(
    tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], phase: Phase
) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(phase.steps):
        yield encode(tokenizer, [problems[step * phase.batch + i] for i in range(phase.batch)])


def encode(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Return right-padded ids and labels ``[batch length]``; only response tokens carry a label."""
    rows = []
    for problem in problems:
        prompt = tokenizer.apply_chat_template(
            [dict(m) for m in problem.messages], add_generation_prompt=True, return_dict=False
        )
        response = tokenizer(problem.response, add_special_tokens=False)["input_ids"]
        rows.append((list(prompt), [*response, tokenizer.eos_token_id]))
    longest = max(len(p) + len(r) for p, r in rows)
    ids = torch.full((len(rows), longest), int(tokenizer.pad_token_id))
    labels = torch.full((len(rows), longest), _IGNORED)
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return ids, labels
