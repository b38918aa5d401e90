"""The immutable values that flow through a training step, from a problem to a per-token loss.

Axes: ``batch`` rows, ``prompt`` prompt positions (left-padded), ``time`` response positions
(right-padded), ``k`` candidate ids at one position. Everything named ``*_logp`` is a natural-log
probability over the shared vocabulary unless its docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.seeds import mix


class Origin(IntEnum):
    """Who wrote a response token."""

    STUDENT = 0
    TEACHER = 1
    DATA = 2
    ENVIRONMENT = 3

    @classmethod
    def named(cls, names: object, field: str) -> frozenset[Origin]:
        """Return the origins that ``names``, a list of words or origins, stands for.

        Raises:
            ConfigError: no list, an empty one, or a word that is no origin; ``field`` names it.
        """
        items = list(names) if isinstance(names, Sequence | frozenset) and not isinstance(names, str) else []
        known = {origin.name.lower(): origin for origin in cls}
        found = [item if isinstance(item, cls) else known.get(str(item)) for item in items]
        if not found or None in found:
            words = ", ".join(known)
            raise ConfigError(
                f"`{field}` must be a list out of {words}, got {names!r}; use [student] for the student's own tokens"
            )
        return frozenset(origin for origin in found if origin is not None)


class Finish(IntEnum):
    """Why a response ended.

    ``LENGTH`` is a truncation by the generation budget; ``HORIZON`` is a stop that the method asked
    for (early-stopping rollouts) and counts as neither success nor truncation.
    """

    EOS = 0
    LENGTH = 1
    HORIZON = 2


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One prompt of a task, as chat messages, with what a grader needs.

    ``index`` identifies the problem within its split and seeds its rollouts. ``response`` is a gold
    response where the data has one. ``difficulty`` is a label that evaluation groups by.
    """

    index: int
    messages: Sequence[Mapping[str, str]]
    answer: str | None = None
    response: str | None = None
    difficulty: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


# A type variable in place of Self, which run-time shape checking in the tests cannot read.
Value = TypeVar("Value", bound="TensorValue")


class TensorValue:
    """Shared behaviour of the frozen dataclasses below: move to a device, pick rows."""

    def to(self: Value, device: torch.device | str, **kwargs: Any) -> Value:
        """Return the same value with every tensor on ``device``."""
        return self._map(lambda t: t.to(device, **kwargs))

    def rows(self: Value, index: Tensor | slice | list[int]) -> Value:
        """Return the rows ``index`` of every batched field."""
        return self._map(lambda t: t[index], index)

    def _map(self: Value, change: Any, index: Any = None) -> Value:
        changed: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = change(value)
            elif isinstance(value, TensorValue):
                changed[f.name] = value._map(change, index)
            elif isinstance(value, Mapping):
                changed[f.name] = {k: change(v) if isinstance(v, Tensor) else v for k, v in value.items()}
            elif index is not None and isinstance(value, tuple):
                changed[f.name] = _pick(value, index)
        return replace(self, **changed)  # type: ignore[type-var]


def _pick(items: tuple[Any, ...], index: Tensor | slice | list[int]) -> tuple[Any, ...]:
    if isinstance(index, slice):
        return items[index]
    return tuple(items[int(i)] for i in index)


@dataclass(frozen=True, kw_only=True)
class PromptBatch(TensorValue):
    """Tokenized prompts, left-padded, with the problems they came from and one random seed per row.

    A row's rollout depends on its prompt, the weights, the sampling settings and ``seeds[row]``, and
    on nothing else: not on its neighbours, their number or their order, up to rounding of the logits.
    """

    ids: Int[Tensor, "batch prompt"]
    mask: Bool[Tensor, "batch prompt"]
    problems: tuple[Problem, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.problems)

    def repeat(self, samples: int) -> PromptBatch:
        """Return each row ``samples`` times in a row, each copy with a seed of its own."""
        return PromptBatch(
            ids=self.ids.repeat_interleave(samples, 0),
            mask=self.mask.repeat_interleave(samples, 0),
            problems=tuple(p for p in self.problems for _ in range(samples)),
            seeds=tuple(mix(seed, sample) for seed in self.seeds for sample in range(samples)),
        )


@dataclass(frozen=True, kw_only=True)
class Generation(TensorValue):
    """What an engine returns: response ids up to and including the stop token, right-padded.

    ``behavior_logp`` is the log-probability of each token under the truncated, renormalised sampler
    that drew it (0 for greedy decoding). ``finish`` holds ``Finish.EOS`` or ``Finish.LENGTH``.
    """

    ids: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    behavior_logp: Float[Tensor, "batch time"]
    finish: Int[Tensor, " batch"]
    top_ids: Int[Tensor, "batch time k"] | None = None


@dataclass(frozen=True, kw_only=True)
class Rollout(TensorValue):
    """Prompts with their responses, token by token, and where each token came from.

    ``horizon`` marks the response tokens inside the loss horizon. ``group`` is the row of the prompt
    that a response belongs to, ``version`` the number of optimizer steps behind the weights that wrote it.
    """

    prompt: PromptBatch
    ids: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    origin: Int[Tensor, "batch time"]
    horizon: Bool[Tensor, "batch time"]
    behavior_logp: Float[Tensor, "batch time"]
    finish: Int[Tensor, " batch"]
    group: Int[Tensor, " batch"]
    version: int = 0
    top_ids: Int[Tensor, "batch time k"] | None = None

    @property
    def sampled(self) -> Bool[Tensor, "batch time"]:
        """Tokens that exist, that the student wrote, inside the loss horizon."""
        return self.written_by(frozenset({Origin.STUDENT}))

    def written_by(self, origins: frozenset[Origin]) -> Bool[Tensor, "batch time"]:
        """Return the tokens of these origins that exist, inside the loss horizon."""
        wrote = [self.origin == origin for origin in sorted(origins)]
        return self.mask & self.horizon & torch.stack(wrote).any(0)

    @property
    def tokens(self) -> TokenBatch:
        """Prompt and response as one sequence, for a scorer."""
        return TokenBatch(
            prompt_ids=self.prompt.ids, prompt_mask=self.prompt.mask, ids=self.ids, mask=self.mask
        )

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Response lengths in tokens, the stop token included."""
        return self.mask.sum(-1)


@dataclass(frozen=True, kw_only=True)
class TokenBatch(TensorValue):
    """Token sequences to score: a left-padded prompt and a right-padded response."""

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Bool[Tensor, "batch prompt"]
    ids: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
