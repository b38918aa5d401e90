"""A coin for each response: the student writes it, or somebody else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opd_lightning.protocols import Writer, Writers
from opd_lightning.rollout._parts import (
    Drawing,
    Source,
    as_rollout,
    check_count,
    check_share,
    check_source,
    check_tokens,
    given_text,
    groups,
    origin_of,
    together,
    tokens,
    writer_of,
)
from opd_lightning.schedule import Schedule, value_at
from opd_lightning.seeds import mix
from opd_lightning.types import Origin, PromptBatch, Rollout

_STEPS = 2**62
"""Seeds have 63 bits; the upper 62 of them, over this, are a uniform number in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Coin(Drawing):
    """Has the student write a response with probability ``on_policy``, and the data or teacher otherwise.

    GKD's lambda (arXiv 2306.13649): the mean loss is lambda E_student[D] + (1 - lambda) E_text[D]. The
    paper's coin is for a batch; here each response has its own, from its own seed, so that one optimizer
    step holds both. As a schedule it is DistiLLM's growing share of student text (arXiv 2402.03898).

    Args:
        samples: responses per prompt. Off-policy ones of ``text: data`` are copies of one response.
        on_policy: probability of the student's own text, in [0, 1]; a number or a schedule.
        text: who writes otherwise, ``"data"`` or ``"teacher"``.
        max_new_tokens: longest response, whoever writes; a longer one is cut there.
        loss_horizon: first response tokens that are in the loss, None for all.
        temperature, top_p, top_k, min_p: of the student.
        teacher_temperature: of the teacher; 0 takes its likeliest token.

    Raises:
        ConfigError: a number out of its range.
    """

    samples: int
    on_policy: float | Schedule
    text: Source
    loss_horizon: float | Schedule | None
    teacher_temperature: float

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        super().__post_init__()
        check_share(self.on_policy, "on_policy", "use 1 for the student's text alone")
        check_source(self.text, "text", self.teacher_temperature)
        check_tokens(self.loss_horizon, "loss_horizon", optional=True)

    @property
    def writers(self) -> frozenset[Writer]:
        """Who is asked to write."""
        return frozenset({"student", writer_of(self.text)})

    def __call__(self, prompts: PromptBatch, writers: Writers, progress: float, top_ids: int) -> Rollout:
        """Return the rollout; a row's tokens all have one origin."""
        asked, group = prompts.repeat(self.samples), groups(prompts, self.samples)
        budget = tokens(self.max_new_tokens, progress)
        horizon = None if self.loss_horizon is None else tokens(self.loss_horizon, progress)
        chance = value_at(self.on_policy, progress)
        own = torch.tensor([_uniform(seed) < chance for seed in asked.seeds], device=group.device)
        rows, parts = [], []
        for origin, chosen in ((Origin.STUDENT, own), (origin_of(self.text), ~own)):
            where = chosen.nonzero()[:, 0]
            if not len(where):
                continue
            part = asked.rows(where)
            if origin == Origin.STUDENT:
                drawn = writers.student(part, self.sampling(budget))
            else:
                drawn = given_text(self.text, part, writers, budget, self.teacher_temperature)
            rows.append(where)
            parts.append(as_rollout(part, drawn, origin=origin, group=group[where], horizon=horizon))
        return together(parts, torch.cat(rows).argsort())


def _uniform(seed: int) -> float:
    """Return the coin's number in [0, 1), which depends on the response's seed alone."""
    return (mix(seed, "coin") >> 1) / _STEPS
