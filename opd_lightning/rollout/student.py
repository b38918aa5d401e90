"""Responses that the student writes, whole or stopped early."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from opd_lightning.protocols import Writer, Writers
from opd_lightning.rollout._parts import Drawing, as_rollout, check_count, check_tokens, groups, tokens
from opd_lightning.schedule import Schedule
from opd_lightning.types import Finish, Origin, PromptBatch, Rollout


@dataclass(frozen=True, kw_only=True)
class StudentRollout(Drawing):
    """Draws ``samples`` responses a prompt from the student.

    Args:
        samples: responses per prompt.
        max_new_tokens: generation horizon, in tokens; a number or a schedule of progress.
        loss_horizon: only the first so many response tokens are in the loss; a number, a schedule, or
            None for all of them. ESR sets both horizons to N (arXiv 2605.27028, section 1).
        early_stop: a response cut at ``max_new_tokens`` is what the method wants, so its finish is
            ``HORIZON`` and not a truncation.
        temperature, top_p, top_k, min_p: see :class:`~opd_lightning.types.Sampling`.

    Raises:
        ConfigError: a number out of its range, or temperature 0 (greedy responses are no samples).
    """

    samples: int
    loss_horizon: float | Schedule | None
    early_stop: bool

    writers: ClassVar[frozenset[Writer]] = frozenset({"student"})

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        super().__post_init__()
        check_tokens(self.loss_horizon, "loss_horizon", optional=True)

    def __call__(self, prompts: PromptBatch, writers: Writers, progress: float, top_ids: int) -> Rollout:
        """Return the rollout; every response token's origin is the student."""
        repeated = prompts.repeat(self.samples)
        generation = writers.student(repeated, self.sampling(tokens(self.max_new_tokens, progress), top_ids))
        rollout = as_rollout(
            repeated,
            generation,
            origin=Origin.STUDENT,
            group=groups(prompts, self.samples),
            horizon=None if self.loss_horizon is None else tokens(self.loss_horizon, progress),
        )
        if not self.early_stop:
            return rollout
        stopped = rollout.finish == Finish.LENGTH
        return replace(rollout, finish=rollout.finish.masked_fill(stopped, Finish.HORIZON))
