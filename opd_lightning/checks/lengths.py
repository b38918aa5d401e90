"""The longest rows of a run against what the models and their servers can take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from opd_lightning.checks.facts import ModelFacts
from opd_lightning.checks.finding import Finding, ok
from opd_lightning.checks.parts import Sizes
from opd_lightning.errors import require
from opd_lightning.loading import Limits, TeacherSource
from opd_lightning.objective import Objective
from opd_lightning.protocols import Engine, RolloutSampler
from opd_lightning.schedule import value_at
from opd_lightning.types import Sampling


@runtime_checkable
class Evaluates(Protocol):
    """How held-out problems are answered; see :class:`~opd_lightning.evaluation.Evaluation`."""

    def modes(self) -> Iterable[tuple[Sampling, int]]:
        """Return the sampling and samples of each evaluation."""
        ...


_LONGER = (
    "raise max_position_embeddings in its config.json where its positions allow it, or choose a longer model"
)


def training_rows(student: ModelFacts, rollout: RolloutSampler, collector: Sizes) -> Iterator[Finding]:
    """Refuse rollouts that are longer than the student's context."""
    rows = rows_of(rollout, collector.max_prompt_tokens)
    if rows is not None and student.context is not None:
        require(
            rows <= student.context,
            "student.path",
            f"have a context of at least {rows} tokens, collector.max_prompt_tokens={collector.max_prompt_tokens} "
            "and the longest response",
            student.context,
            f"lower rollout.max_new_tokens or collector.max_prompt_tokens, {_LONGER}",
        )
        yield ok("student.path", f"has a context of {student.context} tokens for rows of at most {rows}")


def evaluation_rows(student: ModelFacts, evaluation: Evaluates, collector: Sizes) -> Iterator[Finding]:
    """Refuse evaluations that are longer than the student's context."""
    prompt, response = (
        collector.max_prompt_tokens,
        max(sampling.max_new_tokens for sampling, _ in evaluation.modes()),
    )
    if _whole(prompt) and student.context is not None:
        require(
            prompt + response <= student.context,
            "evaluation.settings.max_new_tokens",
            f"leave room for prompts of {prompt} tokens in the student's context of {student.context}",
            response,
            f"use {max(student.context - prompt, 1)}, or lower collector.max_prompt_tokens",
        )
        yield ok(
            "evaluation.settings.max_new_tokens", f"fits: {prompt + response} of {student.context} tokens"
        )


def teacher_rows(
    teacher: TeacherSource, teacher_model: ModelFacts, rollout: RolloutSampler, collector: Sizes
) -> Iterator[Finding]:
    """Refuse rollouts that are longer than the context of a teacher in this process, its own prompts included."""
    prompt = _prompt(teacher, collector)
    rows, context = rows_of(rollout, prompt), teacher_model.context
    if rows is not None and context is not None:
        require(
            rows <= context,
            "teacher.path",
            f"have a context of at least {rows} tokens, prompts of {prompt} and the longest response",
            context,
            f"lower rollout.max_new_tokens or the longest prompt, {_LONGER}",
        )
        yield ok("teacher.path", f"has a context of {context} tokens for rows of at most {rows}")


def served_rows(
    objective: Objective, limits: Limits, rollout: RolloutSampler, collector: Sizes
) -> Iterator[Finding]:
    """Refuse rows and ids that the teacher's server does not take."""
    rows = rows_of(rollout, collector.max_prompt_tokens)
    if rows is not None:
        require(
            rows <= limits.tokens,
            "teacher.address",
            f"name a server for rows of at least {rows} tokens, the longest prompt with its response",
            limits.tokens,
            "raise its context, or lower rollout.max_new_tokens or collector.max_prompt_tokens",
        )
    size = objective.support.size or 0
    if limits.ids is not None:
        require(
            size <= limits.ids,
            "support.k",
            "be at most what the teacher's server scores at a position",
            size,
            f"use {limits.ids}, or start the server with {limits.flag}{size}, which now has {limits.flag}{limits.ids}",
        )
    yield ok("teacher.address", f"answers, and takes rows of {limits.tokens} tokens")


def engine_rows(engine: Engine, rollout: RolloutSampler, collector: Sizes) -> None:
    """Refuse an engine whose rows are shorter than the run's."""
    most, rows = getattr(engine, "max_model_len", None), rows_of(rollout, collector.max_prompt_tokens)
    if most is not None and rows is not None:
        remedy = f"use {rows}, or null for what the model allows"
        require(rows <= most, "engine.max_model_len", f"be at least {rows}", most, remedy)


def _prompt(teacher: Any, collector: Sizes) -> Any:
    """Return the longest prompt that a teacher is shown: its own where it has another."""
    return getattr(teacher, "max_prompt_tokens", collector.max_prompt_tokens)


def rows_of(rollout: RolloutSampler, prompt: Any) -> int | None:
    """Return the most tokens of a row, None where they are not known."""
    longest = getattr(rollout, "max_new_tokens", None)
    if longest is None or not _whole(prompt):
        return None
    # A schedule is monotone: it is longest at one of its ends.
    return int(prompt) + math.ceil(max(value_at(longest, end) for end in (0.0, 1.0)))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
