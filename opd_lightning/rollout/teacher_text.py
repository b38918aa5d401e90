"""Responses that the teacher writes: fresh ones, or one fixed text for each problem."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opd_lightning.errors import require
from opd_lightning.protocols import Writer, Writers
from opd_lightning.rollout._parts import as_rollout, check_count, check_plain, check_tokens, groups, tokens
from opd_lightning.schedule import Schedule
from opd_lightning.seeds import mix
from opd_lightning.types import Generation, Origin, PromptBatch, Rollout, Sampling

_Text = tuple[Tensor, Tensor, int]
"""A remembered response: ids, log-probs, finish."""


@dataclass(frozen=True, kw_only=True)
class TeacherText:
    """Has the teacher write every response, for training on its samples (fine-tuning, sequence-level KD).

    Args:
        samples: responses per prompt.
        fixed: a problem's responses are the same whenever it is met: drawn from its index alone, when it
            is first met, and remembered. Otherwise each meeting has new ones. For a teacher that never changes.
        max_new_tokens: longest response; a number or a schedule of progress.
        loss_horizon: first response tokens that are in the loss, None for all.
        temperature, top_p, top_k, min_p: of the teacher; temperature 0 takes its likeliest token.

    Raises:
        ConfigError: a number out of its range.
    """

    samples: int
    fixed: bool
    max_new_tokens: float | Schedule
    loss_horizon: float | Schedule | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    # Not state of a method: a value in it is a function of its key, so that losing it changes nothing.
    memory: dict[tuple[int, int, int], _Text] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    writers: ClassVar[frozenset[Writer]] = frozenset({"teacher"})

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        require(isinstance(self.fixed, bool), "rollout.fixed", "be true or false", self.fixed, "use false")
        check_plain(self)
        self._sampling(1).checked("rollout")
        check_tokens(self.max_new_tokens, "max_new_tokens")
        check_tokens(self.loss_horizon, "loss_horizon", optional=True)

    def _sampling(self, max_new_tokens: int) -> Sampling:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
        )

    def __call__(self, prompts: PromptBatch, writers: Writers, progress: float, top_ids: int) -> Rollout:
        """Return the rollout; every response token's origin is the teacher. No top ids of the student's."""
        asked, budget = prompts.repeat(self.samples), tokens(self.max_new_tokens, progress)
        drawn = self._remembered(asked, writers, budget) if self.fixed else None
        return as_rollout(
            asked,
            drawn or writers.teacher(asked, self._sampling(budget)),
            origin=Origin.TEACHER,
            group=groups(prompts, self.samples),
            horizon=None if self.loss_horizon is None else tokens(self.loss_horizon, progress),
        )

    def _remembered(self, asked: PromptBatch, writers: Writers, budget: int) -> Generation:
        keys = [(p.index, row % self.samples, budget) for row, p in enumerate(asked.problems)]
        new = {key: row for row, key in enumerate(keys) if key not in self.memory}
        if new:
            seeds = tuple(mix("fixed", index, sample) for index, sample, _ in new)
            drawn = writers.teacher(
                replace(asked.rows(list(new.values())), seeds=seeds), self._sampling(budget)
            )
            for key, ids, mask, logp, finish in zip(
                new, drawn.ids, drawn.mask, drawn.behavior_logp, drawn.finish.tolist(), strict=True
            ):
                self.memory[key] = ids[mask].cpu(), logp[mask].cpu(), finish
        texts, device = [self.memory[key] for key in keys], asked.ids.device
        lengths = torch.tensor([len(ids) for ids, _, _ in texts], device=device)
        ids = pad_sequence([ids for ids, _, _ in texts], batch_first=True).to(device)
        return Generation(
            ids=ids,
            mask=torch.arange(ids.shape[1], device=device) < lengths[:, None],
            behavior_logp=pad_sequence([logp for _, logp, _ in texts], batch_first=True).to(device),
            finish=torch.tensor([finish for _, _, finish in texts], device=device),
        )
