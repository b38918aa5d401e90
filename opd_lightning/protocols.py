"""The narrow interfaces through which the parts meet. Parts import this module and types, never each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.types import (
    Candidates,
    Experience,
    Generation,
    Needs,
    Problem,
    PromptBatch,
    Rollout,
    Sampling,
    Scores,
    TokenBatch,
    TokenLoss,
    Want,
)
from opd_lightning.world import World

Generate = Callable[[PromptBatch, Sampling], Generation]


Combine = Callable[[Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"]], Float[Tensor, "rows vocab"]]
"""From the student's and the teacher's log-probs of the next token to those of the sampler."""

Writer = Literal["student", "teacher", "gold", "mixed"]


@dataclass(frozen=True, kw_only=True)
class Writers:
    """Who can write response tokens for a rollout.

    ``student`` and ``teacher`` draw from their model. ``gold`` returns the data's own responses as token
    ids, with their stop token. ``mixed`` draws each token from a combination of both models.
    """

    student: Generate
    teacher: Generate
    gold: Callable[[PromptBatch], Generation]
    mixed: Callable[[PromptBatch, Sampling, Combine], Generation]


@runtime_checkable
class Engine(Protocol):
    """Generates responses with the student's current weights."""

    def generate(self, model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> Generation:
        """Draw one response for each row of ``prompts``, reproducibly from its seed."""
        ...


@runtime_checkable
class KeepsCopy(Protocol):
    """An engine that draws from a copy of the student's weights, and has to be told when they are others."""

    def bind(self, model: PreTrainedModel, version: int) -> None:
        """Draw for ``model``, whose weights have ``version`` optimizer steps behind them from now on."""
        ...

    def rest(self) -> None:
        """Give back what memory only drawing needs, until the next draw."""
        ...


@runtime_checkable
class DrawsApart(KeepsCopy, Protocol):
    """An engine whose copy draws outside of this process, so that it can while the student trains."""

    def follow(self, model: PreTrainedModel, prompts: PromptBatch) -> None:
        """Send the weights as they are now, where the copy has others. ``prompts`` are among those to come."""
        ...

    def draw(self, model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> Generation:
        """Draw with the weights that were sent last; of ``model`` nothing is read that training changes."""
        ...


@runtime_checkable
class RolloutSampler(Protocol):
    """Decides how responses come about: sampling settings, lengths, who writes which token."""

    @property
    def samples(self) -> int:
        """Responses per prompt, over all writers."""
        ...

    @property
    def writers(self) -> frozenset[Writer]:
        """Who is asked to write."""
        ...

    def __call__(self, prompts: PromptBatch, writers: Writers, progress: float, top_ids: int) -> Rollout:
        """Return ``samples`` responses for each prompt, a prompt's one after another.

        ``progress`` in [0, 1] drives schedules; ``top_ids`` asks for the student's own top ids.
        """
        ...


@runtime_checkable
class Scoring(Protocol):
    """Scores given tokens: the student, a teacher or a reference."""

    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Return what ``want`` asks for at every response position."""
        ...


@runtime_checkable
class Support(Protocol):
    """Chooses which token ids are compared at each position.

    ``size`` is the most ids that a position can have, None for none or the whole vocabulary.
    """

    @property
    def needs(self) -> Needs:
        """What must be collected to choose, and whether a support exists at all."""
        ...

    @property
    def size(self) -> int | None:
        """The most ids at one position."""
        ...

    def __call__(
        self, candidates: Candidates
    ) -> tuple[Int[Tensor, "batch time k"], Bool[Tensor, "batch time k"]]:
        """Return ids and their validity (False at duplicates)."""
        ...


@runtime_checkable
class Divergence(Protocol):
    """A divergence between two normalised distributions on the same categories.

    One that is a generalised JSD says so by ``as_jsd = (beta, scaled)``, and over the whole vocabulary it is
    then computed in closed form.
    """

    def __call__(
        self,
        student_logp: Float[Tensor, "*batch k"],
        teacher_logp: Float[Tensor, "*batch k"],
        valid: Bool[Tensor, "*batch k"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Reduce the last axis. ``valid`` marks the categories that exist."""
        ...


@runtime_checkable
class Reward(Protocol):
    """The reward of a taken token for the score-function estimators."""

    @property
    def needs(self) -> Needs:
        """What must be collected beside both models' log-probs of the taken token."""
        ...

    def __call__(
        self,
        student_logp: Float[Tensor, "batch time"],
        teacher_logp: Float[Tensor, "batch time"],
        experience: Experience,
    ) -> Float[Tensor, "batch time"]:
        """Return one detached number a token; larger is better."""
        ...


@runtime_checkable
class Estimator(Protocol):
    """Turns the objective into a loss per token."""

    @property
    def needs(self) -> Needs:
        """What must be collected."""
        ...

    @property
    def want(self) -> Want:
        """What the student must score in the learning half."""
        ...

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        ...


@runtime_checkable
class Regularizer(Protocol):
    """Adds to the value of a loss, or scales its weight."""

    @property
    def needs(self) -> Needs:
        """What must be collected."""
        ...

    @property
    def want(self) -> Want:
        """What the student must score in the learning half."""
        ...

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the changed loss."""
        ...


@runtime_checkable
class Mask(Protocol):
    """Chooses tokens that teach nothing: they leave the loss and its denominator."""

    @property
    def needs(self) -> Needs:
        """What must be collected."""
        ...

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True where a token stays in the loss.

        ``experience`` is this rank's part of one optimizer step, scored and without shares yet; ``inside``
        marks the tokens that are in the loss so far, for quantiles and ranks.
        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """A part that computes something once, at collection, over a whole optimizer step and all ranks."""

    def prepare(self, experience: Experience, world: World) -> Mapping[str, Float[Tensor, "batch time"]]:
        """Return numbers per token, under names of the part's own, to be stored in ``experience.extras``."""
        ...


@runtime_checkable
class Follows(Protocol):
    """A teacher that changes with the student (live, moving average)."""

    def follow(self, student: Scoring, progress: float) -> None:
        """Take over from ``student``, after each optimizer step; ``progress`` in [0, 1] is that step's."""
        ...


@runtime_checkable
class Routes(Protocol):
    """A teacher that is several, one for each row."""

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' names, the same on every process."""
        ...

    def route(self, prompts: PromptBatch) -> Int[Tensor, " batch"]:
        """Return the place in ``names`` of each row's teacher."""
        ...

    def routed(self, prompts: PromptBatch) -> Scoring:
        """Return what scores responses to these prompts, in this order."""
        ...


@runtime_checkable
class Averaged(Follows, Protocol):
    """A teacher that follows the student and holds what only the run's past could give it."""

    def state_dict(self) -> dict[str, Any]:
        """Return that, as tensors by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back from a checkpoint."""
        ...


@runtime_checkable
class Rests(Protocol):
    """A model whose weights are elsewhere between its uses."""

    def holding(self) -> AbstractContextManager[None]:
        """Leave the weights where work has them until the block ends, from their first use in it on."""
        ...


@runtime_checkable
class Spread(Protocol):
    """A model whose weights are spread over the processes of a run, which all must call it equally often."""

    def placed(self, processes: int) -> str:
        """Say where the weights lie among so many processes, for people."""
        ...


@runtime_checkable
class Reduction(Protocol):
    """Turns the tokens in the loss into each token's share of it.

    ``per_origin`` averages the student's tokens and all others each for themselves: the loss is then the
    sum of two means, as for a gold term beside an on-policy one.
    """

    @property
    def per_origin(self) -> bool:
        """Whether each origin has a denominator of its own."""
        ...

    def __call__(
        self, mask: Bool[Tensor, "batch time"], total: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch time"]:
        """Return shares that sum to 1 over the optimizer step; ``total`` sums a number over ranks."""
        ...


@runtime_checkable
class Task(Protocol):
    """Prompts and a grader."""

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of ``"train"``, ``"validation"`` or ``"test"``, in a fixed order."""
        ...

    def grade(self, problem: Problem, response: str) -> float | None:
        """Return 1.0 for a right, 0.0 for a wrong response, None where the problem has no answer."""
        ...
