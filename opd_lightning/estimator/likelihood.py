"""Cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from opd_lightning.errors import ConfigError
from opd_lightning.functional.masked import masked_fill
from opd_lightning.types import Experience, Needs, Origin, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """value_t = -log S(y_t) on the tokens of ``origins``: plain supervised training, without a teacher's numbers.

    On tokens that the teacher drew, its expected gradient at a prefix is exactly that of KL(T||S) (sequence-level
    distillation on fresh text). On the student's own it is exactly 0, and what such a run shows is noise and the
    choice of responses: a control.

    Raises:
        ConfigError: if ``origins`` is no list of origins.
    """

    origins: Sequence[str]

    want: ClassVar[Want] = Want(taken=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "origins", tuple(self.origins))
        assert self._teaches

    @property
    def needs(self) -> Needs:
        """Nothing but the tokens themselves."""
        return Needs(teaches=self._teaches)

    @property
    def _teaches(self) -> frozenset[Origin]:
        return Origin.named(self.origins, "estimator.origins")

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        if scores.taken_logp is None:
            raise ConfigError("`estimator=likelihood` needs the student's log-probs of the response's tokens")
        taught = experience.rollout.written_by(self._teaches)
        value = -masked_fill(scores.taken_logp, taught)
        return TokenLoss(value=value, weight=taught.to(value.dtype), metrics={"nll": value.detach()})
