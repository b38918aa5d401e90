"""Responses that the student writes, whole or stopped early."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from opd_lightning.errors import require
from opd_lightning.protocols import Writer, Writers
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Finish, Generation, Origin, PromptBatch, Rollout, Sampling


@dataclass(frozen=True, kw_only=True)
class StudentRollout:
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
    max_new_tokens: float | Schedule
    loss_horizon: float | Schedule | None
    early_stop: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float

    writers: ClassVar[frozenset[Writer]] = frozenset({"student"})

    def __post_init__(self) -> None:
        require(
            self.samples >= 1,
            "rollout.samples",
            "be at least 1",
            self.samples,
            "use 1 for one response a prompt",
        )
        require(
            isinstance(self.temperature, int | float) and self.temperature > 0,
            "rollout.temperature",
            "be above 0",
            self.temperature,
            "on-policy training needs samples; greedy decoding belongs to evaluation",
        )
        self._sampling(1).checked("rollout")
        for name in ("max_new_tokens", "loss_horizon"):
            value = getattr(self, name)
            holds = within(value, 1, math.inf) or (name == "loss_horizon" and value is None)
            remedy = "give a number of tokens, or a schedule of one"
            require(holds, f"rollout.{name}", "be at least 1 token", value, remedy)

    def _sampling(self, max_new_tokens: int, top_ids: int = 0) -> Sampling:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            top_ids=top_ids,
        )

    def __call__(self, prompts: PromptBatch, writers: Writers, progress: float, top_ids: int) -> Rollout:
        """Return the rollout; every response token's origin is the student."""
        sampling = self._sampling(_tokens(self.max_new_tokens, progress), top_ids)
        repeated = prompts.repeat(self.samples)
        generation = writers.student(repeated, sampling)
        horizon = None if self.loss_horizon is None else _tokens(self.loss_horizon, progress)
        rollout = _as_rollout(repeated, generation, self.samples, horizon)
        if not self.early_stop:
            return rollout
        cut = rollout.finish == Finish.LENGTH
        return replace(rollout, finish=rollout.finish.masked_fill(cut, Finish.HORIZON))


def _tokens(value: float | Schedule, progress: float) -> int:
    return max(1, round(value_at(value, progress)))


def _as_rollout(prompts: PromptBatch, generation: Generation, samples: int, horizon: int | None) -> Rollout:
    time = torch.arange(generation.ids.shape[1], device=generation.ids.device)
    inside = (
        torch.ones_like(generation.mask) if horizon is None else (time < horizon).expand_as(generation.mask)
    )
    return Rollout(
        prompt=prompts,
        ids=generation.ids,
        mask=generation.mask,
        origin=torch.full_like(generation.ids, Origin.STUDENT),
        horizon=inside,
        behavior_logp=generation.behavior_logp,
        finish=generation.finish,
        group=torch.arange(len(prompts), device=generation.ids.device) // samples,
        top_ids=generation.top_ids,
    )
