"""A divergence on the support, differentiated directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.divergence import FORMS, Form
from opd_lightning.functional.masked import masked_fill
from opd_lightning.protocols import Divergence
from opd_lightning.types import Experience, FullTerm, Needs, Origin, Scores, SupportForm, TokenLoss, Want

_NO_SUPPORT = "`estimator=topk` must have a support to compare on, got none; use support=teacher"


@dataclass(frozen=True, kw_only=True)
class TopK:
    """value_t = divergence(S, T) on the support of position t, in one of three forms.

    ``renormalised``: both sides over the support alone (local support matching, arXiv 2603.25562).
    ``tail``: all that is off the support is one more category. ``plain``: the truncated sum as it is,
    which collapses for reverse KL. On the full support the form makes no difference. ``origins`` says
    whose tokens are compared: beside the student's own, the teacher's or the data's (GKD).

    Raises:
        ConfigError: for an unknown ``form``; with no support, or a renormalised one of a single id.
    """

    divergence: Divergence
    form: Form = "renormalised"
    origins: Sequence[str] = ("student",)

    def __post_init__(self) -> None:
        Origin.named(self.origins, "estimator.origins")
        remedy = "use renormalised, or tail to see the mass off the support"
        require(self.form in FORMS, "estimator.form", f"be one of {', '.join(FORMS)}", self.form, remedy)

    @property
    def needs(self) -> Needs:
        """A support; renormalised over a single id every distribution would be the same."""
        least = 2 if self.form == "renormalised" else 1
        return Needs(support=True, least_support=least, teaches=self._written_by)

    @property
    def want(self) -> Want:
        """Log-probs on the support; without a normaliser where the form cancels it anyway."""
        form: SupportForm = "renormalised" if self.form == "renormalised" else "exact"
        return Want(support=form, full=frozenset({FullTerm("teacher", self.divergence)}))

    @property
    def _written_by(self) -> frozenset[Origin]:
        return Origin.named(self.origins, "estimator.origins")

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        taught = experience.rollout.written_by(self._written_by)
        value = masked_fill(self._value(scores, experience, taught), taught)
        metrics = {"divergence": value.detach()}
        return TokenLoss(value=value, weight=taught.to(value.dtype), metrics=metrics)

    def _value(self, scores: Scores, experience: Experience, taught: Tensor) -> Tensor:
        if experience.teacher_hidden is not None:
            value = scores.full.get(FullTerm("teacher", self.divergence))
            if value is None:
                raise ValueError("on the full support the scores must hold the divergence (Want.full)")
            return value
        student, teacher = scores.support_logp, experience.support_teacher_logp
        if student is None or teacher is None or experience.support_valid is None:
            raise ConfigError(_NO_SUPPORT)
        self._check_size(student.shape[-1])
        # Without the second factor a NaN in padding would reach the gradient through the divergence.
        valid = experience.support_valid & taught.unsqueeze(-1)
        change = FORMS[self.form]
        return self.divergence(change(student, valid), change(teacher, valid))

    def _check_size(self, size: int) -> None:
        if size == 0:
            raise ConfigError(_NO_SUPPORT)
        require(
            size > 1 or self.form != "renormalised",
            "support.k",
            "be at least 2 for a renormalised support (over one id the divergence is always 0)",
            size,
            "use estimator.form=tail or a larger support",
        )
