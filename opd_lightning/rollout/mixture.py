"""The student's own responses beside whole responses of the data or the teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from opd_lightning.errors import require
from opd_lightning.protocols import Writer, Writers
from opd_lightning.rollout._parts import (
    Drawing,
    Source,
    as_rollout,
    check_count,
    check_source,
    check_tokens,
    given_text,
    groups,
    origin_of,
    together,
    tokens,
    writer_of,
)
from opd_lightning.schedule import Schedule
from opd_lightning.seeds import mix
from opd_lightning.types import Origin, PromptBatch, Rollout


@dataclass(frozen=True, kw_only=True)
class Mixture(Drawing):
    """Gives each prompt ``student_samples`` responses of the student, then ``gold_samples`` gold ones.

    Rollout mixture distillation of StableOPD (arXiv 2604.08527, section 4): the gold term and the
    on-policy term are told apart by the tokens' origin, DATA or TEACHER for gold responses.

    Args:
        student_samples: the student's responses per prompt; 0 for gold text alone.
        gold_samples: gold responses per prompt.
        gold: ``"data"``, the task's own responses, of which each problem has one; or ``"teacher"``.
        max_new_tokens: longest response, gold ones included; a longer one is cut there.
        loss_horizon: first tokens of the student's responses that are in the loss, None for all.
        gold_horizon: the same of gold responses.
        temperature, top_p, top_k, min_p: of the student.
        teacher_temperature: of the teacher; 0 takes its likeliest token.

    Raises:
        ConfigError: a number out of its range; nobody who writes; two copies of the data's one response.
    """

    student_samples: int
    gold_samples: int
    gold: Source
    loss_horizon: float | Schedule | None
    gold_horizon: float | Schedule | None
    teacher_temperature: float

    def __post_init__(self) -> None:
        check_count(self.student_samples, "student_samples", 0)
        check_count(self.gold_samples, "gold_samples", 0)
        require(self.samples >= 1, "rollout.student_samples", "leave somebody who writes", 0, "use 1")
        super().__post_init__()
        check_source(self.gold, "gold", self.teacher_temperature)
        check_tokens(self.loss_horizon, "loss_horizon", optional=True)
        check_tokens(self.gold_horizon, "gold_horizon", optional=True)
        require(
            self.gold == "teacher" or self.gold_samples <= 1,
            "rollout.gold_samples",
            "be at most 1 with rollout.gold=data, since a problem has one gold response",
            self.gold_samples,
            "use 1 and raise the gold term's coefficient, or use rollout.gold=teacher",
        )

    @property
    def samples(self) -> int:
        """Responses per prompt, over both writers."""
        return self.student_samples + self.gold_samples

    @property
    def writers(self) -> frozenset[Writer]:
        """Who is asked to write."""
        own: frozenset[Writer] = frozenset({"student"} if self.student_samples else ())
        return own | ({writer_of(self.gold)} if self.gold_samples else set())

    def __call__(self, prompts: PromptBatch, writers: Writers, progress: float, top_ids: int) -> Rollout:
        """Return each prompt's responses, the student's first."""
        budget, parts = tokens(self.max_new_tokens, progress), []
        if self.student_samples:
            asked = prompts.repeat(self.student_samples)
            drawn, written = writers.student(asked, self.sampling(budget)), Origin.STUDENT
            group, horizon = groups(prompts, self.student_samples), self.loss_horizon
            parts.append((asked, drawn, written, group, horizon))
        if self.gold_samples:
            # Seeds of their own, so that no two rows of a group share one.
            apart = replace(prompts, seeds=tuple(mix(seed, "gold") for seed in prompts.seeds))
            asked = apart.repeat(self.gold_samples)
            drawn = given_text(self.gold, asked, writers, budget, self.teacher_temperature)
            group, horizon = groups(prompts, self.gold_samples), self.gold_horizon
            parts.append((asked, drawn, origin_of(self.gold), group, horizon))
        rollouts = [
            as_rollout(
                asked,
                drawn,
                origin=origin,
                group=group,
                horizon=None if horizon is None else tokens(horizon, progress),
            )
            for asked, drawn, origin, group, horizon in parts
        ]
        order = torch.cat([rollout.group for rollout in rollouts]).argsort(stable=True)
        return together(rollouts, order)
