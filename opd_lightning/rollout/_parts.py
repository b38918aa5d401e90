"""What the rollouts share: their checked settings, a text from another writer, and rows put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.protocols import Writer, Writers
from opd_lightning.schedule import Schedule, require_plain, value_at, within
from opd_lightning.seeds import mix
from opd_lightning.types import Finish, Generation, Origin, PromptBatch, Rollout, Sampling

Source = Literal["teacher", "data"]
_WRITERS: dict[str, tuple[Writer, Origin]] = {
    "teacher": ("teacher", Origin.TEACHER),
    "data": ("gold", Origin.DATA),
}
_PLAIN = {
    "temperature": "use 1 for the model's own distribution",
    "top_p": "use 1 to keep every token",
    "top_k": "use 0 to keep every token",
    "min_p": "use 0 to keep every token",
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How long responses may become and how the student draws them.

    Args:
        max_new_tokens: longest response, in tokens; a number or a schedule of progress.
        temperature, top_p, top_k, min_p: see :class:`~opd_lightning.types.Sampling`.

    Raises:
        ConfigError: a number out of its range, or temperature 0 (greedy responses are no samples).
    """

    max_new_tokens: float | Schedule
    temperature: float
    top_p: float
    top_k: int
    min_p: float

    def __post_init__(self) -> None:
        check_plain(self)
        require(
            isinstance(self.temperature, int | float) and self.temperature > 0,
            "rollout.temperature",
            "be above 0",
            self.temperature,
            "on-policy training needs samples; greedy decoding belongs to evaluation",
        )
        self.sampling(1).checked("rollout")
        check_tokens(self.max_new_tokens, "max_new_tokens")

    def sampling(self, max_new_tokens: int, top_ids: int = 0) -> Sampling:
        """Return the student's settings for a budget of ``max_new_tokens``."""
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            top_ids=top_ids,
        )


# -- checks


def check_plain(rollout: object) -> None:
    """Refuse a schedule of how tokens are drawn."""
    for name, remedy in _PLAIN.items():
        require_plain(getattr(rollout, name), f"rollout.{name}", remedy)


def check_count(value: object, name: str, least: int = 1) -> None:
    """Refuse a number of responses that is not whole, or below ``least``."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    condition = f"be a whole number of at least {least}"
    require(whole, f"rollout.{name}", condition, value, "use 1 for one response a prompt")


def check_tokens(value: object, name: str, *, optional: bool = False) -> None:
    """Refuse what is neither a number of tokens nor a schedule of one; None passes where ``optional``."""
    holds = within(value, 1, math.inf) or (optional and value is None)
    remedy = "give a number of tokens, or a schedule of one"
    require(holds, f"rollout.{name}", "be at least 1 token", value, remedy)


def check_share(value: object, name: str, remedy: str) -> None:
    """Refuse what leaves [0, 1]."""
    require(
        within(value, 0.0, 1.0), f"rollout.{name}", "be in [0, 1], as a number or a schedule", value, remedy
    )


def check_source(value: object, name: str, teacher_temperature: float) -> None:
    """Refuse an unknown writer, or a temperature that the teacher cannot draw at."""
    remedy = "use teacher for its samples, data for the task's own responses"
    require(value in _WRITERS, f"rollout.{name}", "be teacher or data", value, remedy)
    require_plain(teacher_temperature, "rollout.teacher_temperature", "use 1 for the teacher's own text")
    number = isinstance(teacher_temperature, int | float) and 0 <= teacher_temperature < math.inf
    condition = "be a finite number of at least 0"
    require(
        number,
        "rollout.teacher_temperature",
        condition,
        teacher_temperature,
        "use 1 for the teacher's own text",
    )


def tokens(value: float | Schedule, progress: float) -> int:
    """Return a length at ``progress``: the nearest whole number, at least 1."""
    return max(1, round(value_at(value, progress)))


# -- texts


def writer_of(source: Source) -> Writer:
    """Return who writes the text that a user calls teacher or data."""
    return _WRITERS[source][0]


def origin_of(source: Source) -> Origin:
    """Return the origin of that text."""
    return _WRITERS[source][1]


def given_text(
    source: Source, prompts: PromptBatch, writers: Writers, budget: int, temperature: float
) -> Generation:
    """Return one response a row from the teacher or the data, of at most ``budget`` tokens.

    The teacher's draws have seeds of their own, so that they share no random number with the student's.
    """
    if source == "data":
        return cut(writers.gold(prompts), budget)
    own = replace(prompts, seeds=tuple(mix(seed, "teacher") for seed in prompts.seeds))
    return writers.teacher(own, Sampling(max_new_tokens=budget, temperature=temperature))


def cut(generation: Generation, budget: int) -> Generation:
    """Return responses of at most ``budget`` tokens; one that was longer ends for its length."""
    over = generation.mask.sum(-1) > budget
    return Generation(
        ids=generation.ids[:, :budget],
        mask=generation.mask[:, :budget],
        behavior_logp=generation.behavior_logp[:, :budget],
        finish=generation.finish.masked_fill(over, Finish.LENGTH),
        top_ids=None if generation.top_ids is None else generation.top_ids[:, :budget],
    )


# -- rows


def as_rollout(
    prompts: PromptBatch,
    generation: Generation,
    *,
    origin: Origin,
    group: Int[Tensor, " batch"],
    horizon: int | None = None,
) -> Rollout:
    """Return the responses of one writer; only the first ``horizon`` tokens are in the loss, None for all."""
    mask = generation.mask
    time = torch.arange(mask.shape[1], device=mask.device)
    inside = torch.ones_like(mask) if horizon is None else (time < horizon).expand_as(mask)
    return Rollout(
        prompt=prompts,
        ids=generation.ids,
        mask=mask,
        origin=mask.long() * int(origin),
        horizon=inside,
        behavior_logp=generation.behavior_logp,
        finish=generation.finish,
        group=group,
        top_ids=generation.top_ids,
    )


def groups(prompts: PromptBatch, samples: int) -> Int[Tensor, " batch"]:
    """Return the prompt's place for each of ``samples`` responses a prompt."""
    return torch.arange(len(prompts), device=prompts.ids.device).repeat_interleave(samples)


def together(parts: Sequence[Rollout], order: Int[Tensor, " batch"]) -> Rollout:
    """Stack the rows of ``parts``, padded to one length, and return them in ``order``.

    The student's top ids are left out: other writers have none, and the collector then scores the student.
    """
    longest = max(part.ids.shape[1] for part in parts)
    joined: dict[str, Any] = {"top_ids": None}
    for field in fields(Rollout):
        values = [getattr(part, field.name) for part in parts]
        if field.name not in joined and isinstance(values[0], Tensor):
            joined[field.name] = torch.cat([_padded(value, longest) for value in values])
    prompts = [part.prompt for part in parts]
    prompt = PromptBatch(
        ids=torch.cat([p.ids for p in prompts]),
        mask=torch.cat([p.mask for p in prompts]),
        problems=tuple(problem for p in prompts for problem in p.problems),
        seeds=tuple(seed for p in prompts for seed in p.seeds),
    )
    return Rollout(prompt=prompt, **joined).rows(order)


def _padded(values: Tensor, longest: int) -> Tensor:
    if values.ndim == 1:
        return values
    return torch.nn.functional.pad(values, [0, longest - values.shape[1]])
