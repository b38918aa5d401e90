"""The collecting half of a run: prompts to experience, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.buffer import micro_batches
from opd_lightning.clock import PhaseClock
from opd_lightning.diagnostics.collection import CollectionReport, describe
from opd_lightning.errors import ConfigError, require
from opd_lightning.objective import Objective
from opd_lightning.prompts import Prompts
from opd_lightning.protocols import Engine, RolloutSampler, Scoring, Task
from opd_lightning.scorer import Scorer
from opd_lightning.types import (
    Candidates,
    Experience,
    Finish,
    Generation,
    Graded,
    PromptBatch,
    Rollout,
    Sampling,
    Scores,
    Want,
)


@dataclass(frozen=True)
class World:
    """This process among the processes of a run. ``total`` sums a tensor over all of them."""

    rank: int = 0
    size: int = 1
    total: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)


def check_sizes(
    prompts_per_collection: int, steps_per_collection: int, score_rows: int, probe_rows: int
) -> None:
    """Raise ConfigError unless the sizes of a collection fit together; needs no model."""
    least = {
        "steps_per_collection": (steps_per_collection, 1, "use 1 to train on each response once"),
        "score_rows": (score_rows, 1, "use 32"),
        "probe_rows": (probe_rows, 0, "use 0 for no probe"),
        "prompts_per_collection": (prompts_per_collection, 1, f"use {steps_per_collection}"),
    }
    for name, (value, low, remedy) in least.items():
        whole = isinstance(value, int) and value >= low
        require(whole, f"collector.{name}", f"be a whole number of at least {low}", value, remedy)
    per_step, rest = divmod(prompts_per_collection, steps_per_collection)
    require(
        rest == 0,
        "collector.prompts_per_collection",
        f"be a multiple of collector.steps_per_collection={steps_per_collection}",
        prompts_per_collection,
        f"use {(per_step + 1) * steps_per_collection}, since each optimizer step takes as many prompts",
    )


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Generates responses, has them scored, selects the support and cuts the result for training.

    Args:
        task: grader of the responses, for the reported accuracy.
        prompts: the training split as a stream.
        engine: generates; ``rollout`` decides how.
        rollout: how responses come about.
        teacher: scores the student's tokens; outside the trained module.
        objective: what the parts need, and which tokens are in the loss.
        tokenizer: decodes responses for grading.
        stop_ids: ids that end a response.
        prompts_per_collection: prompts drawn each time, over all ranks and optimizer steps.
        steps_per_collection: optimizer steps taken on one collection.
        score_rows: responses in one forward of a scorer.
        probe_rows: responses of a collection that the student scores exactly for the diagnostics.

    Raises:
        ConfigError: prompts that cannot be divided evenly over steps and ranks.
    """

    task: Task
    prompts: Prompts
    engine: Engine
    rollout: RolloutSampler
    teacher: Scoring
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    prompts_per_collection: int
    steps_per_collection: int
    score_rows: int
    probe_rows: int
    clock: PhaseClock = field(default_factory=PhaseClock)

    def __post_init__(self) -> None:
        check_sizes(self.prompts_per_collection, self.steps_per_collection, self.score_rows, self.probe_rows)

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

    def collect(
        self, student: Scorer, collection: int, progress: float, version: int, accumulate: int, world: World
    ) -> tuple[list[list[Experience]], CollectionReport]:
        """Return ``steps_per_collection`` optimizer steps of ``accumulate`` micro-batches each.

        Args:
            student: its weights write and are scored; no gradient is kept.
            collection: number of this collection; with the seed it decides prompts and draws.
            progress: optimizer steps done over planned steps, fixed during the collection.
            version: optimizer steps behind the student's weights.
            accumulate: micro-batches of one optimizer step.
            world: this process among all.
        """
        with torch.no_grad():
            rollout = replace(self._roll_out(student, collection, progress, world), version=version)
            with self.clock.during("score"):
                experience = replace(self._score(student, rollout), progress=progress)
                self.clock.tokens["score"] += int(rollout.mask.sum())
            report = describe(self._graded(rollout), experience, self._probe(student, experience))
            steps = [
                micro_batches(self._with_shares(part, world), accumulate) for part in self._steps(experience)
            ]
        return steps, report

    # -- generation

    def _roll_out(self, student: Scorer, collection: int, progress: float, world: World) -> Rollout:
        per_step = self.prompts_per_collection // self.steps_per_collection
        start = collection * self.prompts_per_collection
        # Step by step, every world.size-th prompt: the same prompts meet in a step whatever the world.
        positions = [
            start + step * per_step + j
            for step in range(self.steps_per_collection)
            for j in range(world.rank, per_step, world.size)
        ]
        device = student.device
        prompts = self.prompts.stream(positions).to(device)
        with self.clock.during("generate"):
            generate = partial(self._generate, student)
            rollout = self.rollout(prompts, generate, progress, self.objective.needs.student_top)
            self.clock.tokens["generate"] += int(rollout.mask.sum())
        return rollout

    def _generate(self, student: Scorer, prompts: PromptBatch, sampling: Sampling) -> Generation:
        sampling = replace(sampling, stop_ids=self.stop_ids, vocab=student.vocab)
        return self.engine.generate(student.model, prompts, sampling)

    # -- scoring

    def _score(self, student: Scorer, rollout: Rollout) -> Experience:
        """Score all rows, those of like length together, and return them in the rollout's order."""
        order = torch.argsort(rollout.prompt.mask.sum(-1) + rollout.lengths, stable=True)
        parts = [self._score_rows(student, rollout.rows(rows)) for rows in order.split(self.score_rows)]
        back = torch.argsort(order)
        joined = {
            f.name: torch.cat([getattr(part, f.name) for part in parts])[back]
            for f in fields(Experience)
            if isinstance(getattr(parts[0], f.name), Tensor)
        }
        return Experience(rollout=rollout, **joined)  # type: ignore[arg-type]

    def _score_rows(self, student: Scorer, rollout: Rollout) -> Experience:
        """One forward of the teacher, and at most one of the student, for some rows."""
        needs, tokens = self.objective.needs, rollout.tokens
        own = self._student_scores(student, rollout)
        student_top = None
        if needs.student_top:
            chosen = rollout.top_ids if own is None or own.top_ids is None else own.top_ids
            assert chosen is not None
            student_top = chosen[..., : needs.student_top]
        given = (
            rollout.ids.unsqueeze(-1)
            if student_top is None
            else torch.cat([rollout.ids.unsqueeze(-1), student_top], -1)
        )
        want = Want(taken=True, entropy=True, support="exact", top=needs.teacher_top, hidden=needs.full)
        taught = self.teacher(tokens, want, given)
        candidates = Candidates(taken=rollout.ids, teacher_top=taught.top_ids, student_top=student_top)
        support: dict[str, Tensor] = {}
        if needs.support and not needs.full:
            ids, valid = self.objective.support(candidates)
            support = {"support_ids": ids, "support_valid": valid & rollout.mask.unsqueeze(-1)}
            support["support_teacher_logp"] = _look_up(ids, support["support_valid"], taught, given)
        return Experience(
            rollout=rollout,
            share=torch.zeros_like(rollout.behavior_logp),
            teacher_taken_logp=taught.taken_logp,
            teacher_entropy=taught.entropy,
            teacher_hidden=taught.hidden,
            collected_logp=None if own is None else own.taken_logp,
            **support,  # type: ignore[arg-type]
        )

    def _student_scores(self, student: Scorer, rollout: Rollout) -> Scores | None:
        """What the engine did not give: the untruncated log-prob, and top ids where it has none."""
        needs = self.objective.needs
        known = 0 if rollout.top_ids is None else rollout.top_ids.shape[-1]
        top = needs.student_top if needs.student_top > known else 0
        if not top and not needs.collected_logp:
            return None
        return student(rollout.tokens, Want(taken=needs.collected_logp, top=top))

    # -- cutting

    def _steps(self, experience: Experience) -> list[Experience]:
        rows = len(experience.share) // self.steps_per_collection
        return [experience.rows(slice(i * rows, (i + 1) * rows)) for i in range(self.steps_per_collection)]

    def _with_shares(self, experience: Experience, world: World) -> Experience:
        return replace(experience, share=self.objective.shares(experience.rollout, world.total))

    # -- looking

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
            with self.clock.during("evaluate"):
                bounded = replace(sampling, stop_ids=self.stop_ids, vocab=model.vocab)
                graded = respond_and_grade(
                    self.task, self.tokenizer, self.engine, model.model, asked, bounded
                )
                self.clock.tokens["evaluate"] += int(graded.lengths.sum())
            yield graded


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
        group=torch.tensor([p.index for p in prompts.problems]),
        difficulty=tuple(p.difficulty for p in prompts.problems),
        prompts=tuple(str(p.messages[-1]["content"]) for p in prompts.problems),
        texts=tuple(texts),
    )


def _look_up(
    ids: Int[Tensor, "batch time k"],
    valid: Bool[Tensor, "batch time k"],
    taught: Scores,
    given: Int[Tensor, "batch time g"],
) -> Float[Tensor, "batch time k"]:
    """Return the teacher's log-probs at selected ids.

    Raises:
        ConfigError: the support chose an id that is not among its candidates, so that nobody scored it.
    """
    assert taught.support_logp is not None
    known_ids, known_logp = given, taught.support_logp
    if taught.top_ids is not None and taught.top_logp is not None:
        known_ids = torch.cat([known_ids, taught.top_ids], -1)
        known_logp = torch.cat([known_logp, taught.top_logp], -1)
    same = ids.unsqueeze(-1) == known_ids.unsqueeze(-2)
    if bool((valid & ~same.any(-1)).any()):
        raise ConfigError(
            "`support` must choose among its candidates (the taken token and the top ids that it declares in "
            "`needs`), got another id; declare more top ids, or mark that entry invalid"
        )
    where = same.to(torch.uint8).argmax(-1)
    return known_logp.gather(-1, where)
