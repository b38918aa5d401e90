"""Tokens and floating-point operations of a whole run, over all processes, and the hours that they take.

Counted as :mod:`opd_lightning.diagnostics.utilisation` counts them: 2 N operations a token that is generated
or scored, 6 N for one that is trained, and 2 H V (or 2 H K) at each response position for the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opd_lightning.diagnostics.utilisation import Work
from opd_lightning.planning.run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run does, over all processes.

    ``tokens`` and ``operations`` are by phase, ``hours`` of all processes side by side, at an assumed share
    of the peak.
    """

    collections: int
    prompts: int
    responses: int
    tokens: dict[str, float]
    operations: dict[str, float]
    hours: dict[str, float]

    @property
    def total_hours(self) -> float:
        """Hours by the clock."""
        return sum(self.hours.values())


def cost(run: PlannedRun, peak_tflops: float, utilisation: Mapping[str, float]) -> Cost:
    """Return the cost of a run.

    Args:
        run: what is planned.
        peak_tflops: of one process's device.
        utilisation: share of it that generate, score, train and evaluate reach.
    """
    collections = -(-run.steps // run.collection_steps)
    responses = collections * run.prompts * run.samples
    trained = run.steps * (run.prompts // run.collection_steps) * run.samples
    tokens = {
        "prompts": float(responses * run.prompt_tokens),
        "generate": responses * run.mean if run.writers & {"student", "teacher", "mixed"} else 0.0,
        "score": responses * run.mean,
        "train": trained * run.mean,
        "evaluate": float(run.evaluations * run.evaluation_rows * run.evaluation_tokens),
    }
    operations = _operations(run, collections, responses, trained)
    speed = {name: peak_tflops * 1e12 * utilisation[name] * run.processes for name in operations}
    return Cost(
        collections=collections,
        prompts=collections * run.prompts,
        responses=responses,
        tokens=tokens,
        operations=operations,
        hours={name: done / speed[name] / 3600 for name, done in operations.items()},
    )


def _operations(run: PlannedRun, collections: int, responses: int, trained: int) -> dict[str, float]:
    student, vocab = run.student.work, run.student.vocab
    teachers = [model.shape.work for model in run.frozen]
    read, written = run.prompt_tokens + run.mean, run.mean

    def forward(works: list[Work], rows: float, heads: float) -> float:
        return sum(rows * work.forward(read, written, heads) for work in works)

    writing = [student] if run.writers & {"student", "mixed"} else []
    if run.writers & {"teacher", "mixed"}:
        writing += [model.shape.work for model in run.frozen if model.role == "teacher"]
    scoring = [*teachers, *([student] if run.student_scored else [])]
    probed = collections * min(run.probe_rows * run.processes, run.prompts * run.samples)
    learned = vocab if run.exact_learning or run.full else run.support
    learning = student.forward(read, written, learned) + student.backward(read, written, learned)
    answered = run.evaluations * run.evaluation_rows
    answer = student.forward(run.prompt_tokens + run.evaluation_tokens, run.evaluation_tokens, vocab)
    return {
        "generate": forward(writing, responses, vocab),
        "score": forward(scoring, responses, vocab) + forward([student], probed, vocab),
        "train": trained * learning,
        "evaluate": answered * answer,
    }
