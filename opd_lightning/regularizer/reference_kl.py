"""The divergence from a frozen reference, added to a loss."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.divergence import FORMS, Form, reverse_kl
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.penalty import k2
from opd_lightning.regularizer._terms import add
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, FullTerm, Needs, Scores, SupportForm, TokenLoss, Want

How = Literal["full", "k2", "support"]
_TERM = FullTerm("reference", reverse_kl)
_BIASED = "say that the support's divergence is meant (what is off the support is not the reference's KL)"


@dataclass(frozen=True, kw_only=True)
class ReferenceKL:
    """Adds coefficient * KL(S||R) on the student's own tokens (Stable-OPD, arXiv 2604.08527, section 4).

    ``full``: the exact sum over the vocabulary at each of these positions. ``k2``: 1/2 (log S(y) - log R(y))^2
    of the taken token, differentiated directly; the same expected gradient where y ~ S (no top-p), a
    fraction of the cost, more variance. ``support``: the sum on the run's support in ``support_form``; it has
    another gradient, so ``biased`` must name it.

    Raises:
        ConfigError: a negative coefficient, an unknown form, ``support`` without ``biased``; on a call, nothing
            to compare on.
    """

    coefficient: float | Schedule
    form: How = "full"
    support_form: Form = "renormalised"
    biased: bool = False

    def __post_init__(self) -> None:
        name, forms = "regularizer.reference_kl", get_args(How)
        positive = within(self.coefficient, 0.0, sys.float_info.max)
        require(
            positive, f"{name}.coefficient", "be a finite number of at least 0", self.coefficient, "use 0.01"
        )
        require(self.form in forms, f"{name}.form", f"be one of {', '.join(forms)}", self.form, "use full")
        known = self.support_form in FORMS
        require(known, f"{name}.support_form", f"be one of {', '.join(FORMS)}", self.support_form, "use tail")
        exact = self.form != "support" or self.biased is True
        require(exact, f"{name}.biased", _BIASED, self.biased, "set it true, or use form=full or form=k2")

    @property
    def needs(self) -> Needs:
        """What the reference must say: hidden states, the taken token's log-prob, or those of the support."""
        if self.form == "support":
            least = 2 if self.support_form == "renormalised" else 1
            return Needs(support=True, least_support=least, reference_support=True)
        return Needs(reference_hidden=self.form == "full", reference_taken=self.form == "k2")

    @property
    def want(self) -> Want:
        """What the student must say beside it."""
        if self.form == "support":
            form: SupportForm = "renormalised" if self.support_form == "renormalised" else "exact"
            return Want(support=form)
        return Want(full=frozenset({_TERM})) if self.form == "full" else Want(taken=True)

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with the term added; its metric is the divergence without the coefficient, nats."""
        sampled = experience.rollout.sampled
        value = masked_fill(self._value(scores, experience, sampled), sampled)
        loss = add(loss, value_at(self.coefficient, progress) * value, sampled)
        return replace(loss, metrics={**loss.metrics, "reference_kl": value.detach()})

    def _value(self, scores: Scores, experience: Experience, sampled: Tensor) -> Tensor:
        student, reference = scores.taken_logp, experience.reference_taken_logp
        if self.form == "full" and _TERM in scores.full:
            return scores.full[_TERM]
        if self.form == "k2" and student is not None and reference is not None:
            return k2(masked_fill(student, sampled), masked_fill(reference, sampled))
        student, reference = scores.support_logp, experience.reference_support_logp
        if self.form == "support" and not (student is None or reference is None):
            assert experience.support_valid is not None
            valid, change = experience.support_valid & sampled.unsqueeze(-1), FORMS[self.support_form]
            return reverse_kl(change(student, valid), change(reference, valid))
        raise ConfigError(
            f"`regularizer.reference_kl` must have the {self.form} scores of student and reference, got none; "
            "use form=full where the support is the whole vocabulary"
        )
