"""Imitation of tokens that another wrote."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.penalty import k1
from opd_lightning.regularizer._terms import add
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.types import Experience, Needs, Origin, Scores, TokenLoss, Want

_LEGAL = frozenset({Origin.TEACHER, Origin.DATA})
_AWAY = "name a scalar gradient (its ascent direction is opposite to imitation)"


@dataclass(frozen=True, kw_only=True)
class Imitation:
    """Adds a term that teaches the student tokens of ``origins``, the teacher's or the data's.

    ``direct``: -coefficient log S(y), cross-entropy. For y ~ T its mean gradient is coefficient * grad KL(T||S).
    Gold solutions of Stable-OPD (arXiv 2604.08527, section 4), the teacher's prefixes of TrOPD (arXiv
    2606.01249, formula). ``scalar``: -sg(A) log S(y) with A = coefficient (log S(y) - log T(y)), TrOPD's
    released code. It leads *away* from the teacher (cosine about -0.95), so ``biased`` must name it.

    Raises:
        ConfigError: a negative coefficient, other origins, an unknown gradient, ``scalar`` without ``biased``.
    """

    coefficient: float | Schedule
    origins: Sequence[str | Origin] = ("teacher", "data")
    gradient: Literal["direct", "scalar"] = "direct"
    biased: bool = False

    def __post_init__(self) -> None:
        name = "regularizer.imitation"
        positive = within(self.coefficient, 0.0, sys.float_info.max)
        require(
            positive, f"{name}.coefficient", "be a finite number of at least 0", self.coefficient, "use 0.1"
        )
        others = Origin.named(self.origins, f"{name}.origins") <= _LEGAL
        reason = "be out of teacher, data (imitating the student's own tokens has a mean gradient of 0)"
        require(others, f"{name}.origins", reason, self.origins, "use [teacher, data]")
        object.__setattr__(self, "origins", tuple(self.origins))
        known = self.gradient in ("direct", "scalar")
        require(known, f"{name}.gradient", "be direct or scalar", self.gradient, "use direct")
        right = self.gradient == "direct" or self.biased is True
        require(right, f"{name}.biased", _AWAY, self.biased, "use gradient=direct, or set it true")

    @property
    def needs(self) -> Needs:
        """Tokens of these origins in the loss; for ``scalar`` the teacher's log-prob of them."""
        origins = Origin.named(self.origins, "regularizer.imitation.origins")
        return Needs(teaches=origins, teacher_taken=self.gradient == "scalar")

    @property
    def want(self) -> Want:
        """The student's log-prob of the taken token."""
        return Want(taken=True)

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with the term added; its metric is -log S(y) without the coefficient, nats."""
        taught = experience.rollout.written_by(self.needs.teaches)
        if scores.taken_logp is None:
            raise ConfigError("imitation needs the student's log-probs of the taken token")
        student, factor = masked_fill(scores.taken_logp, taught), value_at(self.coefficient, progress)
        term = -factor * student
        if self.gradient == "scalar":
            if experience.teacher_taken_logp is None:
                raise ConfigError("scalar imitation needs the teacher's log-probs of the taken token")
            teacher = masked_fill(experience.teacher_taken_logp, taught)
            term = k1(student, teacher).detach() * term
        loss = add(loss, term, taught)
        return replace(loss, metrics={**loss.metrics, "imitation": -student.detach()})
