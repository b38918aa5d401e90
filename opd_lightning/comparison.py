"""A divergence of the student from the teacher on the support, as an estimator or a regularizer has it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.divergence import FORMS, Form
from opd_lightning.functional.masked import masked_fill
from opd_lightning.protocols import Divergence
from opd_lightning.types import Experience, FullTerm, Needs, Scores, SupportForm, Want


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """divergence(S, T) on the support of each position, differentiable, in one of three forms.

    ``renormalised``: both sides over the support alone. ``tail``: all that is off the support is one more
    category. ``plain``: the truncated sum as it is. On the full support the form makes no difference.

    Two combinations are not what they are called, and need ``biased``. A plain sum of a divergence that
    does not hold on truncated rows (it has no attribute ``holds_truncated``): the truncated reverse KL
    rewards mass that leaves the support (Revisiting OPD, arXiv 2603.25562). And the tail of a single id:
    the taken token against all others is no estimate of the divergence over the vocabulary.

    ``owner`` names the part in errors.

    Raises:
        ConfigError: for an unknown ``form``; for a biased combination that is not named so; on a call with
            no support, or a renormalised one of a single id.
    """

    divergence: Divergence
    form: Form
    biased: bool
    owner: str

    def __post_init__(self) -> None:
        remedy = "use renormalised, or tail to see the mass off the support"
        require(self.form in FORMS, f"{self.owner}.form", f"be one of {', '.join(FORMS)}", self.form, remedy)
        truncated = self.form == "plain" and not getattr(self.divergence, "holds_truncated", False)
        require(
            self.biased or not truncated,
            f"{self.owner}.form",
            f"be renormalised or tail for {_name(self.divergence)} (its truncated sum may be negative and "
            "can reward mass that leaves the support)",
            self.form,
            f"use tail, a generalised divergence, or {self.owner}.biased=true to have it so",
        )

    @property
    def needs(self) -> Needs:
        """A support, of at least two ids where over one the value would be nothing or another divergence."""
        one = self.form == "plain" or (self.form == "tail" and self.biased)
        return Needs(support=True, least_support=1 if one else 2)

    @property
    def want(self) -> Want:
        """Log-probs on the support; without a normaliser where the form cancels it anyway."""
        form: SupportForm = "renormalised" if self.form == "renormalised" else "exact"
        return Want(support=form, full=frozenset({self._term}))

    @property
    def _term(self) -> FullTerm:
        return FullTerm("teacher", self.divergence)

    def __call__(
        self, scores: Scores, experience: Experience, mask: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time"]:
        """Return the divergence at the tokens of ``mask``, nats, and 0 elsewhere."""
        if experience.teacher_hidden is not None:
            return masked_fill(full_term(scores, self._term), mask)
        student, teacher = scores.support_logp, experience.support_teacher_logp
        if student is None or teacher is None or experience.support_valid is None or not student.shape[-1]:
            raise ConfigError(
                f"`{self.owner}` must have a support to compare on, got none; use support=teacher"
            )
        require(
            student.shape[-1] > 1 or self.form != "renormalised",
            "support.k",
            "be at least 2 for a renormalised support (over one id the divergence is always 0)",
            student.shape[-1],
            f"use {self.owner}.form=tail or a larger support",
        )
        # Without the second factor a NaN in padding would reach the gradient through the divergence.
        valid = experience.support_valid & mask.unsqueeze(-1)
        change = FORMS[self.form]
        return masked_fill(self.divergence(change(student, valid), change(teacher, valid)), mask)


def full_term(scores: Scores, term: FullTerm) -> Float[Tensor, "batch time"]:
    """Return a divergence over the whole vocabulary that the scores hold.

    Raises:
        ValueError: they do not; the part did not ask for it in ``want``.
    """
    value = scores.full.get(term)
    if value is None:
        raise ValueError("on the full support the scores must hold the divergence (Want.full)")
    return value


def _name(divergence: Divergence) -> str:
    return getattr(divergence, "__name__", type(divergence).__name__)
