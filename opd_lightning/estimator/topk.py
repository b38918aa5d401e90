"""A divergence on the support, differentiated directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from opd_lightning.comparison import Comparison
from opd_lightning.errors import require
from opd_lightning.estimator._origins import check_scales, origin_weight
from opd_lightning.functional.divergence import Form
from opd_lightning.protocols import Divergence
from opd_lightning.schedule import Schedule
from opd_lightning.types import Experience, Needs, Origin, Scores, TokenLoss, Want


@dataclass(frozen=True, kw_only=True)
class TopK:
    """value_t = divergence(S, T) on the support of position t, in one of three forms.

    ``renormalised``: both sides over the support alone (local support matching, arXiv 2603.25562).
    ``tail``: all that is off the support is one more category. ``plain``: the truncated sum as it is.
    ``biased`` accepts what is not the divergence it is called; see
    :class:`~opd_lightning.comparison.Comparison`.

    ``origins`` says whose tokens are compared: beside the student's own, the teacher's or the data's (GKD,
    arXiv 2306.13649). ``other_divergence`` takes the place of ``divergence`` on tokens that the student did
    not write, and ``origin_scale`` scales the weight of each origin's tokens (DistiLLM-2, arXiv 2503.07067).

    ``gradient`` has one legal value: a divergence on the support is a number of the position, the same
    whichever token was drawn there, and as an advantage its expected gradient is exactly 0.

    Raises:
        ConfigError: for settings that do not go together; with no support, or too small a one.
    """

    divergence: Divergence
    form: Form = "renormalised"
    gradient: Literal["direct", "score"] = "direct"
    biased: bool = False
    origins: Sequence[str] = ("student",)
    other_divergence: Divergence | None = None
    origin_scale: Mapping[str, float | Schedule] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "origins", tuple(self.origins))
        require(
            self.gradient == "direct",
            "estimator.gradient",
            'be "direct" (a top-K divergence depends on the position only; as the advantage of a sampled token its '
            "expected gradient is exactly 0)",
            self.gradient,
            'use "direct", or estimator=token for a score function',
        )
        check_scales(self.origin_scale, self._teaches, "estimator.origin_scale")
        others = self.other_divergence is None or self._teaches != {Origin.STUDENT}
        condition = "be null while estimator.origins is the student alone"
        remedy = "add teacher or data to estimator.origins"
        require(others, "estimator.other_divergence", condition, self.other_divergence, remedy)
        self._comparisons()  # checks the form

    @property
    def needs(self) -> Needs:
        """A support; renormalised over a single id every distribution would be the same."""
        return replace(self._comparisons()[0].needs, teaches=self._teaches)

    @property
    def want(self) -> Want:
        """Log-probs on the support; without a normaliser where the form cancels it anyway."""
        own, other = self._comparisons()
        return own.want | other.want

    @property
    def _teaches(self) -> frozenset[Origin]:
        return Origin.named(self.origins, "estimator.origins")

    def _comparisons(self) -> tuple[Comparison, Comparison]:
        own = Comparison(divergence=self.divergence, form=self.form, biased=self.biased, owner="estimator")
        return own, own if self.other_divergence is None else replace(own, divergence=self.other_divergence)

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        rollout, (own, other) = experience.rollout, self._comparisons()
        taught, written = rollout.written_by(self._teaches), rollout.sampled
        value = own(scores, experience, taught if own is other else taught & written)
        if own is not other:
            value = value + other(scores, experience, taught & ~written)
        weight = origin_weight(rollout, self._teaches, self.origin_scale, progress, value.dtype)
        return TokenLoss(value=value, weight=weight, metrics={"divergence": value.detach()})
