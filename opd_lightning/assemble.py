"""Putting the two halves of a run together from their parts; the commands and Python users share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.collector import Collector, check_sizes
from opd_lightning.data import Evaluation, OnPolicyData
from opd_lightning.errors import require
from opd_lightning.models import (
    check_dtype,
    load_model,
    load_tokenizer,
    shared_vocabulary,
    stop_ids,
    vocabulary_width,
)
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import Objective
from opd_lightning.prompts import Prompts
from opd_lightning.protocols import Engine, RolloutSampler, Task
from opd_lightning.scorer import Scorer, check_head
from opd_lightning.teacher.local import FrozenScorer, LocalTeacher


@dataclass(frozen=True, kw_only=True)
class CollectorSettings:
    """Numbers of the collecting half; see :class:`~opd_lightning.collector.Collector` and ``Prompts``."""

    prompts_per_collection: int
    steps_per_collection: int
    score_rows: int
    probe_rows: int
    max_prompt_tokens: int
    long_prompts: Literal["drop", "refuse"]

    def __post_init__(self) -> None:
        check_sizes(self.prompts_per_collection, self.steps_per_collection, self.score_rows, self.probe_rows)


@dataclass(frozen=True, kw_only=True)
class Run:
    """An assembled run: ``lightning.Trainer(...).fit(run.module, run.data)`` trains it."""

    module: OnPolicyDistillation
    data: OnPolicyData
    teacher: FrozenScorer
    tokenizer: PreTrainedTokenizerBase


def assemble(
    *,
    student_path: str,
    teacher: LocalTeacher,
    task: Task,
    engine: Engine,
    rollout: RolloutSampler,
    objective: Objective,
    collector: CollectorSettings,
    evaluation: Evaluation,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    scheduler: Callable[[Optimizer, int], LRScheduler] | None,
    student_dtype: str = "float32",
    head_chunk: int = 2048,
    split: str = "validation",
    seed: int = 0,
) -> Run:
    """Load the models and build both halves around them, cheap checks first.

    ``head_chunk`` is the number of positions whose logits are alive at once, of student and teacher alike.

    Raises:
        ConfigError: anything that cannot work, before a weight is read wherever possible.
    """
    check_dtype(student_dtype, "student.dtype")
    require(head_chunk >= 1, "student.head_chunk", "be at least 1 position", head_chunk, "use 2048")
    check_dtype(teacher.dtype, "teacher.dtype")
    tokenizer = load_tokenizer(student_path, "student.path")
    vocab = shared_vocabulary(
        tokenizer,
        load_tokenizer(teacher.path, "teacher.path"),
        (vocabulary_width(student_path, "student.path"), vocabulary_width(teacher.path, "teacher.path")),
    )
    most = max(objective.needs.teacher_top, objective.needs.student_top)
    require(most <= vocab, "support.k", f"be at most the vocabulary's {vocab} ids", most, "use support=full")
    objective = replace(
        objective,
        masks={k: m.bind(tokenizer) if hasattr(m, "bind") else m for k, m in objective.masks.items()},
    )
    limits = {"max_tokens": collector.max_prompt_tokens, "long": collector.long_prompts}
    training = Prompts(problems=task.problems("train"), tokenizer=tokenizer, seed=seed, **limits)  # type: ignore[arg-type]
    held_out = task.problems(split)
    validation = Prompts(problems=held_out, tokenizer=tokenizer, seed=0, **limits) if len(held_out) else None  # type: ignore[arg-type]
    model = load_model(student_path, "student.path", student_dtype)
    student = Scorer(model, vocab, head_chunk)
    check_head(student, student_path)
    student.train()
    stops = stop_ids(model, tokenizer)
    covered = [stop for stop in stops if stop < vocab]
    require(
        bool(covered), "teacher.path", f"know the student's stop ids {stops}", vocab, "use a wider teacher"
    )
    frozen = teacher.load(vocab, head_chunk)
    if objective.want.full:
        student.set_full_target(frozen.scorer, objective.estimator.divergence)  # type: ignore[attr-defined]
    collecting = Collector(
        task=task,
        prompts=training,
        engine=engine,
        rollout=rollout,
        teacher=frozen,
        objective=objective,
        tokenizer=tokenizer,
        stop_ids=stops,
        prompts_per_collection=collector.prompts_per_collection,
        steps_per_collection=collector.steps_per_collection,
        score_rows=collector.score_rows,
        probe_rows=collector.probe_rows,
    )
    module = OnPolicyDistillation(student, objective, optimizer, scheduler)
    return Run(
        module=module,
        data=OnPolicyData(collecting, validation, evaluation),
        teacher=frozen,
        tokenizer=tokenizer,
    )
