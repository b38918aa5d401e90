"""The immutable values that flow through a training step, from a problem to a per-token loss.

Axes: ``batch`` rows, ``prompt`` prompt positions (left-padded), ``time`` response positions
(right-padded), ``k`` candidate ids at one position. Everything named ``*_logp`` is a natural-log
probability over the shared vocabulary unless its docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.seeds import mix


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Origin(IntEnum):
    """Who wrote a response token."""

    STUDENT = 0
    TEACHER = 1
    DATA = 2
    ENVIRONMENT = 3


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
class Sampling:
    """How an engine draws tokens. ``temperature=0`` is greedy decoding.

    Truncation follows the usual order: temperature, then top-k, top-p, min-p, each on what the one
    before it kept, renormalised. ``vocab`` is the shared vocabulary: no id at or above it is drawn.
    ``top_ids`` asks for the student's own top ids at each position (ranked before truncation).
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    vocab: int | None = None
    top_ids: int = 0

    def checked(self, owner: str = "sampling") -> Sampling:
        """Return these settings, each in its range.

        Args:
            owner: the configuration key that holds them, for the errors; ``""`` for the top level.

        Raises:
            ConfigError: a number out of its range, under the key that the user set.
        """
        wholes = {"max_new_tokens": (1, "raise it"), "top_k": (0, "use 0 to keep every token")}
        numbers: dict[str, tuple[bool, str, str]] = {
            "temperature": (
                _number(self.temperature) and 0 <= self.temperature < math.inf,
                "be a finite number of at least 0",
                "use 0 for greedy decoding and 1 for the model's own distribution",
            ),
            "top_p": (
                _number(self.top_p) and 0 < self.top_p <= 1,
                "be in (0, 1]",
                "use 1 to keep every token",
            ),
            "min_p": (
                _number(self.min_p) and 0 <= self.min_p < 1,
                "be in [0, 1)",
                "use 0 to keep every token",
            ),
        }
        for name, (least, remedy) in (wholes | {"top_ids": (0, "use 0 for none")}).items():
            value = getattr(self, name)
            holds = isinstance(value, int) and not isinstance(value, bool) and value >= least
            numbers[name] = (holds, f"be a whole number of at least {least}", remedy)
        for name, (holds, condition, remedy) in numbers.items():
            require(holds, f"{owner}.{name}" if owner else name, condition, getattr(self, name), remedy)
        return self


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
        return self.mask & self.horizon & (self.origin == Origin.STUDENT)

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


SupportForm = Literal["none", "renormalised", "exact"]


@dataclass(frozen=True, kw_only=True)
class Want:
    """What a scorer is asked for, at every response position.

    ``taken``: log-prob of the response token. ``support``: log-probs at given ids, ``"renormalised"``
    over those ids alone (no normaliser over the vocabulary is computed) or ``"exact"``. ``entropy`` of
    the full distribution, nats. ``top``: its own top ids and their exact log-probs. ``hidden``: the
    last hidden states themselves. ``full``: the divergence over the whole vocabulary from a teacher
    given by its hidden states.
    """

    taken: bool = False
    support: SupportForm = "none"
    entropy: bool = False
    top: int = 0
    hidden: bool = False
    full: bool = False

    def __or__(self, other: Want) -> Want:
        """Return what serves both requests; exact log-probs serve a renormalised request too."""
        forms: tuple[SupportForm, ...] = ("none", "renormalised", "exact")
        return Want(
            taken=self.taken or other.taken,
            support=max(self.support, other.support, key=forms.index),
            entropy=self.entropy or other.entropy,
            top=max(self.top, other.top),
            hidden=self.hidden or other.hidden,
            full=self.full or other.full,
        )


@dataclass(frozen=True, kw_only=True)
class Scores(TensorValue):
    """What a scorer answers, at every response position; padding positions hold zeros.

    ``support_logp`` is exact, or renormalised over the given ids when that is all that was asked for.
    ``divergence`` is the full-vocabulary divergence where ``Want.full`` asked for it.
    """

    taken_logp: Float[Tensor, "batch time"] | None = None
    support_logp: Float[Tensor, "batch time k"] | None = None
    entropy: Float[Tensor, "batch time"] | None = None
    top_ids: Int[Tensor, "batch time top"] | None = None
    top_logp: Float[Tensor, "batch time top"] | None = None
    hidden: Float[Tensor, "batch time hidden"] | None = None
    divergence: Float[Tensor, "batch time"] | None = None


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a part needs to have been collected; the collector serves the union with one pass a model.

    ``support``: that a support is selected. ``full``: that it is the whole vocabulary or a selection.
    ``teacher_top``, ``student_top``: top ids of that model. ``collected_logp``: the untruncated
    student's log-prob of the taken token at collection. ``least_support``: the fewest tokens that a
    support may hold.
    """

    support: bool = False
    least_support: int = 0
    full: bool = False
    teacher_top: int = 0
    student_top: int = 0
    teacher_taken: bool = False
    teacher_entropy: bool = False
    collected_logp: bool = False

    def __or__(self, other: Needs) -> Needs:
        """Return what serves both."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Needs(**{name: max(a, b) for name, a, b in pairs})


@dataclass(frozen=True, kw_only=True)
class Candidates(TensorValue):
    """What a support selects from: the taken token and the top ids of either model."""

    taken: Int[Tensor, "batch time"]
    teacher_top: Int[Tensor, "batch time a"] | None = None
    student_top: Int[Tensor, "batch time b"] | None = None


@dataclass(frozen=True, kw_only=True)
class Experience(TensorValue):
    """Everything that the learning half needs of some responses; a pure function of collected data.

    ``share`` is each token's share of the loss: it is zero outside the loss and sums to 1 over the
    optimizer step, all its micro-batches and ranks together, so that a loss is ``sum(share * value)``
    however the step is cut. ``support_valid`` is False at duplicate or padded support entries, whose
    log-probs are finite and meaningless. For the full support ``teacher_hidden`` replaces ids.
    ``progress`` is the run's when the responses were collected: the clock that schedules read.
    """

    rollout: Rollout
    share: Float[Tensor, "batch time"]
    progress: float = 0.0
    teacher_taken_logp: Float[Tensor, "batch time"] | None = None
    teacher_entropy: Float[Tensor, "batch time"] | None = None
    support_ids: Int[Tensor, "batch time k"] | None = None
    support_valid: Bool[Tensor, "batch time k"] | None = None
    support_teacher_logp: Float[Tensor, "batch time k"] | None = None
    teacher_hidden: Float[Tensor, "batch time hidden"] | None = None
    collected_logp: Float[Tensor, "batch time"] | None = None
    reward: Float[Tensor, " batch"] | None = None


@dataclass(frozen=True, kw_only=True)
class Graded(TensorValue):
    """Responses with their grades, for evaluation. ``correct`` is 1, 0, or nan without an answer.

    A truncated response is wrong. ``group`` numbers the problem within its split.
    """

    correct: Float[Tensor, " batch"]
    lengths: Int[Tensor, " batch"]
    truncated: Bool[Tensor, " batch"]
    group: Int[Tensor, " batch"]
    difficulty: tuple[str | None, ...]
    prompts: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TokenLoss(TensorValue):
    """A loss before reduction: per-token value (with gradient) and weight, and named per-token metrics."""

    value: Float[Tensor, "batch time"]
    weight: Float[Tensor, "batch time"]
    metrics: Mapping[str, Float[Tensor, "batch time"]] = field(default_factory=dict)
