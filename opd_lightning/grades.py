"""Responses to graded responses: decoding, and the task's own grader."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.functional.text import repeated_share, repetitive
from opd_lightning.protocols import Engine, Task
from opd_lightning.types import Finish, Graded, PromptBatch, Sampling


@torch.no_grad()
def respond_and_grade(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    model: PreTrainedModel,
    prompts: PromptBatch,
    sampling: Sampling,
) -> Graded:
    """Generate a response to each row of ``prompts`` and grade it."""
    drawn = engine.generate(model, prompts, sampling)
    return grade(task, tokenizer, prompts, drawn.ids, drawn.mask, drawn.finish)


def grade(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptBatch,
    ids: Int[Tensor, "batch time"],
    mask: Tensor,
    finish: Int[Tensor, " batch"],
) -> Graded:
    """Decode and grade responses; one that its budget cut is wrong."""
    rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    truncated = finish == Finish.LENGTH
    grades = [task.grade(p, t) for p, t in zip(prompts.problems, texts, strict=True)]
    correct = [
        float("nan") if g is None else g * (not cut)
        for g, cut in zip(grades, truncated.tolist(), strict=True)
    ]
    return Graded(
        correct=torch.tensor(correct, dtype=torch.float32),
        lengths=mask.sum(-1).cpu(),
        truncated=truncated.cpu(),
        repetition=torch.tensor([repeated_share(row) for row in rows], dtype=torch.float32),
        repetitive=torch.tensor([repetitive(text) for text in texts], dtype=torch.bool),
        group=torch.tensor([p.index for p in prompts.problems]),
        difficulty=tuple(p.difficulty for p in prompts.problems),
        prompts=tuple(str(p.messages[-1]["content"]) for p in prompts.problems),
        texts=tuple(texts),
    )
