"""The collecting half of a run: prompts to experience, without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.ahead import Ahead, Order, Sent, Told
from opd_lightning.buffer import micro_batch_count
from opd_lightning.clock import PhaseClock
from opd_lightning.diagnostics.collection import CollectionReport, describe
from opd_lightning.diagnostics.utilisation import Meter
from opd_lightning.errors import require
from opd_lightning.grades import grade, respond_and_grade
from opd_lightning.layers import eager
from opd_lightning.objective import Objective
from opd_lightning.prompts import Prompts
from opd_lightning.protocols import (
    DrawsApart,
    Engine,
    KeepsCopy,
    RolloutSampler,
    Routes,
    Scoring,
    Task,
    Writer,
)
from opd_lightning.scorer import Scorer
from opd_lightning.scoring import ScoringPass
from opd_lightning.sizes import check_sizes, longest_row
from opd_lightning.types import (
    Experience,
    Generation,
    Graded,
    PromptBatch,
    Rollout,
    Sampling,
    Scores,
    Want,
)
from opd_lightning.world import World
from opd_lightning.writing import Budget, counted, shortened, writers_for


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Generates responses, has them scored, selects the support and cuts the result for training.

    Args:
        task: grader of the responses, for the reported accuracy.
        prompts: the training split as a stream.
        engine: generates; ``rollout`` decides how.
        rollout: how responses come about.
        teacher: scores the student's tokens; outside the trained module.
        reference: the frozen starting student, where a part needs one.
        objective: what the parts need, and which tokens are in the loss.
        tokenizer: decodes responses for grading.
        stop_ids: ids that end a response.
        prompts_per_collection: prompts drawn each time, over all ranks and optimizer steps.
        steps_per_collection: optimizer steps taken on one collection.
        score_rows: responses in one forward of a scorer.
        score_tokens: in their place, the most tokens in one forward of a scorer, padding included.
        micro_batch_tokens: the most tokens of a micro-batch, padding included; see :meth:`micro_batches`.
        clock: what takes how long, in this process.
        meter: counts the arithmetic of generation, where it follows the models; None for no counts.
        probe_rows: responses of a collection that the student scores exactly for the diagnostics.
        budget: how long responses may be now; an alarm shortens it.
        ahead: the next collection's responses, where ``engine.ahead`` has them written before their time.

    Raises:
        ConfigError: prompts that cannot be divided evenly over steps and ranks; a budget that is too small.
    """

    task: Task
    prompts: Prompts
    engine: Engine
    rollout: RolloutSampler
    teacher: Scoring
    reference: Scoring | None = None
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    prompts_per_collection: int
    steps_per_collection: int
    score_rows: int
    probe_rows: int
    score_tokens: int | None = None
    micro_batch_tokens: int | None = None
    clock: PhaseClock = field(default_factory=PhaseClock)
    meter: Meter | None = None
    ahead: Ahead = field(default_factory=Ahead, compare=False)
    budget: Budget = field(default_factory=Budget, compare=False)

    def __post_init__(self) -> None:
        sizes = (self.prompts_per_collection, self.steps_per_collection, self.score_rows, self.probe_rows)
        check_sizes(*sizes, self.score_tokens)

    def check_world(self, size: int) -> None:
        """Refuse a number of processes that the prompts of an optimizer step cannot be divided by."""
        per_step = self.prompts_per_collection // self.steps_per_collection
        require(
            per_step % size == 0,
            "collector.prompts_per_collection",
            f"give each optimizer step a multiple of {size} prompts (one share a process)",
            self.prompts_per_collection,
            f"use {-(-per_step // size) * size * self.steps_per_collection}",
        )

    def micro_batches(self, processes: int) -> int | None:
        """Return the micro-batches of an optimizer step that the budget asks for, None without one.

        The count is the run's, and the same on every process, so that it is that of the most tokens that a
        step may have: each response at its longest, behind a prompt at its longest.

        Raises:
            ConfigError: a budget below one such row.
        """
        if self.micro_batch_tokens is None:
            return None
        prompts = self.prompts_per_collection // self.steps_per_collection // processes
        longest = longest_row(self.rollout, self.prompts.max_tokens)
        return micro_batch_count(prompts * self.rollout.samples, longest, self.micro_batch_tokens)

    def collect(
        self,
        student: Scorer,
        collection: int,
        progress: float,
        version: int,
        world: World,
        upcoming: float | None = None,
    ) -> tuple[list[Experience], CollectionReport]:
        """Return ``steps_per_collection`` optimizer steps, this process's rows of each.

        Args:
            student: its weights write and are scored; no gradient is kept.
            collection: number of this collection; with the seed it decides prompts and draws.
            progress: optimizer steps done over planned steps, fixed during the collection.
            version: optimizer steps behind the student's weights.
            world: this process among all.
            upcoming: the progress of the next collection, None where none follows.
        """
        with torch.no_grad():
            rollout = self._taken(student, collection)
            if rollout is None:
                order = Order(
                    collection=collection, progress=progress, version=version, share=self.budget.share
                )
                rollout = self._roll_out(student, order, world)
            if upcoming is not None and self.runs_ahead:
                order = Order(
                    collection=collection + 1, progress=upcoming, version=version, share=self.budget.share
                )
                self._write_ahead(student, order, world)
            graded = self._graded(rollout)
            with self.clock.during("score"):
                experience = replace(
                    self._scored(student, rollout),
                    progress=progress,
                    reward=graded.correct.to(rollout.ids.device),
                )
                self.clock.tokens["score"] += int(rollout.mask.sum())
            report = describe(graded, experience, self._probe(student, experience), self._taught(rollout))
            if self.runs_ahead:
                report.sums["rollout/versions_behind"] = float(version - rollout.version), 1.0
            steps = [self.objective.finish(part, world) for part in self._steps(experience)]
            self.ahead.done()
        return steps, report

    # -- generation

    @contextmanager
    def drawing(self, student: Scorer, version: int) -> Iterator[None]:
        """Have the engine draw from the student's weights after ``version`` optimizer steps inside the block."""
        if not isinstance(self.engine, KeepsCopy):
            yield
            return
        if self.ahead.unfinished:  # it is written by the weights that the engine has now
            with self.clock.during("generate"):
                self.ahead.wait()
        self.engine.bind(student.model, version)
        try:
            yield
        finally:
            self.engine.rest()

    def _roll_out(self, student: Scorer, order: Order, world: World) -> Rollout:
        """Return the responses of a collection, written now."""
        with self.drawing(student, order.version):
            prompts = self._prompts(order.collection, world).to(student.device)
            with self.clock.during("generate"), eager(student.model):
                return self._write(self.engine, student, prompts, order, partial(self._written, student))

    def _prompts(self, collection: int, world: World) -> PromptBatch:
        per_step = self.prompts_per_collection // self.steps_per_collection
        start = collection * self.prompts_per_collection
        # Step by step, every world.size-th prompt: the same prompts meet in a step whatever the world.
        positions = [
            start + step * per_step + j
            for step in range(self.steps_per_collection)
            for j in range(world.rank, per_step, world.size)
        ]
        return self.prompts.stream(positions)

    def _write(
        self, engine: Engine, student: Scorer, prompts: PromptBatch, order: Order, tell: Told
    ) -> Rollout:
        writers = writers_for(
            engine, student, self.teacher, self.tokenizer, self.stop_ids, self.rollout.writers
        )
        writers = counted(shortened(writers, order.share, self.budget.least), tell)
        top = self.objective.needs.student_top
        rollout = self.rollout(prompts, writers, order.progress, top)
        return replace(rollout, version=order.version)

    def _written(
        self, student: Scorer, writer: Writer, prompts: PromptBatch, drawn: Generation | Rollout
    ) -> None:
        """Count what was generated. A teacher's prompts count as the student's, where they are longer too."""
        self.clock.count(int(drawn.mask.sum()))
        teacher = getattr(self.teacher, "scorer", None)
        models = {"student": (student,), "teacher": (teacher,), "mixed": (student, teacher)}
        for model in models.get(writer, ()):
            if self.meter is not None:
                self.meter.generated(model, prompts, drawn.mask.sum(-1))

    # -- running ahead

    @property
    def runs_ahead(self) -> bool:
        """Whether each collection is written when the one before begins to be trained on."""
        return bool(getattr(self.engine, "ahead", 0))

    def _write_ahead(self, student: Scorer, order: Order, world: World) -> None:
        """Have the weights as they are write a collection's responses: beside training, where the engine can."""
        if not (isinstance(self.engine, DrawsApart) and self._student_alone):
            self.ahead.restore(order.collection, self._roll_out(student, order, world))
            return
        prompts = self._prompts(order.collection, world).to(student.device)
        with self.clock.during("generate"):
            self.engine.bind(student.model, order.version)
            self.engine.follow(student.model, prompts)
        sent = Sent(self.engine)
        self.ahead.write(order.collection, lambda tell: self._write(sent, student, prompts, order, tell))

    @property
    def _student_alone(self) -> bool:
        """Whether nobody else writes: what a teacher or the data writes is written in this process."""
        return self.rollout.writers == {"student"}

    def _taken(self, student: Scorer, collection: int) -> Rollout | None:
        """Return what was written of this collection before, None without; waiting for it counts as generation."""
        if not self.runs_ahead:
            return None
        with self.clock.during("generate"):
            written = self.ahead.take(collection)
            if written is None:
                return None
            untold: Sequence[Any] = written.untold
            if not untold and isinstance(self.engine, DrawsApart) and self._student_alone:
                # From a checkpoint: what is written beside training is counted when it is read.
                untold = [("student", written.rollout.prompt, written.rollout)]
            for drawn in untold:
                self._written(student, *drawn)
        return written.rollout

    # -- scoring and cutting

    def _scored(self, student: Scorer, rollout: Rollout) -> Experience:
        scoring = ScoringPass(
            teacher=self.teacher,
            reference=self.reference,
            objective=self.objective,
            rows=self.score_rows,
            tokens=self.score_tokens,
        )
        return scoring(student, rollout)

    def _steps(self, experience: Experience) -> list[Experience]:
        rows = len(experience.share) // self.steps_per_collection
        return [experience.rows(slice(i * rows, (i + 1) * rows)) for i in range(self.steps_per_collection)]

    # -- looking

    def _taught(self, rollout: Rollout) -> dict[str, Tensor]:
        """Return which rows are whose, where there are several teachers."""
        if not isinstance(self.teacher, Routes):
            return {}
        places = self.teacher.route(rollout.prompt)
        return {name: places == place for place, name in enumerate(self.teacher.names)}

    def _probe(self, student: Scorer, experience: Experience) -> tuple[Experience, Scores] | None:
        """Score a few rows exactly with the student, for what a loss on few tokens cannot see."""
        if not self.probe_rows:
            return None
        with self.clock.during("probe"):
            rows = experience.rows(slice(0, self.probe_rows))
            form: Want = Want(
                taken=True, entropy=True, support="none" if rows.support_ids is None else "exact"
            )
            return rows, student(rows.rollout.tokens, form, rows.support_ids)

    def _graded(self, rollout: Rollout) -> Graded:
        return grade(self.task, self.tokenizer, rollout.prompt, rollout.ids, rollout.mask, rollout.finish)

    def evaluate(
        self,
        model: Scorer,
        prompts: Prompts,
        rows: Sequence[int],
        sampling: Sampling,
        samples: int,
        batch: int,
    ) -> Iterator[Graded]:
        """Generate and grade ``samples`` responses to the prompts ``rows`` of a split, ``batch`` at a time."""
        device = model.device
        for start in range(0, len(rows), batch):
            asked = prompts.first(rows[start : start + batch]).repeat(samples).to(device)
            with self.clock.during("evaluate"), eager(model.model):
                bounded = replace(sampling, stop_ids=self.stop_ids, vocab=model.vocab)
                graded = respond_and_grade(
                    self.task, self.tokenizer, self.engine, model.model, asked, bounded
                )
                self.clock.tokens["evaluate"] += int(graded.lengths.sum())
                if self.meter is not None:
                    self.meter.generated(model, asked, graded.lengths)
            yield graded
