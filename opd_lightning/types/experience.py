"""What is scored, collected and lost, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.types.requests import FullTerm
from opd_lightning.types.values import Rollout, TensorValue


@dataclass(frozen=True, kw_only=True)
class Scores(TensorValue):
    """What a scorer answers, at every response position; padding positions hold zeros.

    ``support_logp`` is exact, or renormalised over the given ids when that is all that was asked for.
    ``full`` holds the divergences over the whole vocabulary that ``Want.full`` asked for.
    """

    taken_logp: Float[Tensor, "batch time"] | None = None
    support_logp: Float[Tensor, "batch time k"] | None = None
    entropy: Float[Tensor, "batch time"] | None = None
    top_ids: Int[Tensor, "batch time top"] | None = None
    top_logp: Float[Tensor, "batch time top"] | None = None
    hidden: Float[Tensor, "batch time hidden"] | None = None
    full: Mapping[FullTerm, Float[Tensor, "batch time"]] = field(default_factory=dict)


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
    ``collected_*`` are the untruncated student's when the responses were scored, nats: after ``engine.ahead``
    later weights than those that wrote them. ``reward`` is the task's grade, nan without one. ``extras``
    holds what parts prepared for themselves over the whole optimizer step (draws of gates, thresholds,
    statistics), by name.
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
    collected_entropy: Float[Tensor, "batch time"] | None = None
    collected_full: Mapping[FullTerm, Float[Tensor, "batch time"]] = field(default_factory=dict)
    reference_taken_logp: Float[Tensor, "batch time"] | None = None
    reference_support_logp: Float[Tensor, "batch time k"] | None = None
    reference_hidden: Float[Tensor, "batch time width"] | None = None
    reward: Float[Tensor, " batch"] | None = None
    extras: Mapping[str, Float[Tensor, "batch time"]] = field(default_factory=dict)

    @property
    def hidden(self) -> dict[str, Tensor]:
        """The hidden states of other models that a full-vocabulary divergence reads, by model."""
        states = {"teacher": self.teacher_hidden, "reference": self.reference_hidden}
        return {name: state for name, state in states.items() if state is not None}


@dataclass(frozen=True, kw_only=True)
class Graded(TensorValue):
    """Responses with their grades, for evaluation. ``correct`` is 1, 0, or nan without an answer.

    A truncated response is wrong. ``group`` numbers the problem within its split. ``repetition`` is the share
    of a response's 8-grams of tokens that occurred before in it, ``repetitive`` whether its text ends in a loop
    (StableOPD's rep(y)).
    """

    correct: Float[Tensor, " batch"]
    lengths: Int[Tensor, " batch"]
    truncated: Bool[Tensor, " batch"]
    repetition: Float[Tensor, " batch"]
    repetitive: Bool[Tensor, " batch"]
    group: Int[Tensor, " batch"]
    difficulty: tuple[str | None, ...]
    prompts: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TokenLoss(TensorValue):
    """A loss before reduction: per-token value (with gradient) and weight, and named per-token metrics.

    ``advantage`` is the detached advantage A behind a value that holds -A log S(y), where the estimator has
    one; a part that removes or scales that term does the same to ``advantage``.
    """

    value: Float[Tensor, "batch time"]
    weight: Float[Tensor, "batch time"]
    advantage: Float[Tensor, "batch time"] | None = None
    metrics: Mapping[str, Float[Tensor, "batch time"]] = field(default_factory=dict)
