"""The exact reverse KL of each position, beside a score function."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from opd_lightning.comparison import Comparison
from opd_lightning.errors import require
from opd_lightning.functional.divergence import Form, reverse_kl
from opd_lightning.regularizer._terms import add
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want

_NAME = "regularizer.step_kl"


@dataclass(frozen=True, kw_only=True)
class StepKL:
    """Adds coefficient * KL(S||T) of each position, differentiated directly, on the student's own tokens.

    MiniLLM (arXiv 2306.08543) takes a token's own reward out of its sampled return and has its exact gradient in
    its place; here the term comes beside whatever the estimator is. Over the whole vocabulary with
    support=full, else on the support in ``form``, with ``biased`` as in ``estimator=topk``. Metric ``step_kl``.

    Raises:
        ConfigError: for a negative coefficient, a form that is unknown or not what it is called, no support.
    """

    coefficient: float | Schedule
    form: Form = "renormalised"
    biased: bool = False

    def __post_init__(self) -> None:
        holds = within(self.coefficient, 0.0, sys.float_info.max)
        condition = "be a finite number of at least 0"
        require(holds, f"{_NAME}.coefficient", condition, self.coefficient, "use 1")
        assert self._comparison.needs  # it checks the form

    @property
    def _comparison(self) -> Comparison:
        return Comparison(divergence=reverse_kl, form=self.form, biased=self.biased, owner=_NAME)

    @property
    def needs(self) -> Needs:
        """A support."""
        return self._comparison.needs

    @property
    def want(self) -> Want:
        """The student's log-probs on it."""
        return self._comparison.want

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with the divergence added."""
        sampled = experience.rollout.sampled
        divergence = self._comparison(scores, experience, sampled)
        loss = replace(loss, metrics={**loss.metrics, "step_kl": divergence.detach()})
        return add(loss, value_at(self.coefficient, progress) * divergence, sampled)
