"""Skew KL and skew reverse KL."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional import divergence
from opd_lightning.schedule import require_plain


@dataclass(frozen=True, kw_only=True)
class Skewed:
    """A KL to a mixture that holds ``alpha`` of its own first argument (DistiLLM, arXiv 2402.03898).

    ``forward``: KL(T || alpha T + (1 - alpha) S). ``reverse``: KL(S || alpha S + (1 - alpha) T). The
    log-ratio is at most -log(alpha), so no single token can dominate.

    Raises:
        ConfigError: if ``alpha`` lies outside [0, 1) or ``direction`` is neither word.
    """

    alpha: float
    direction: divergence.Direction

    def __post_init__(self) -> None:
        require_plain(self.alpha, "divergence.alpha", "use 0.1, the paper's value")
        require(
            isinstance(self.alpha, (int, float)) and 0.0 <= self.alpha < 1.0,
            "divergence.alpha",
            "be in [0, 1)",
            self.alpha,
            "use 0.1, the paper's value; at 1 the divergence is 0 everywhere",
        )
        require(
            self.direction in ("reverse", "forward"),
            "divergence.direction",
            'be "reverse" or "forward"',
            self.direction,
            "reverse compares the student with the mixture, forward the teacher",
        )

    def __call__(
        self,
        student_logp: Float[Tensor, "*batch k"],
        teacher_logp: Float[Tensor, "*batch k"],
        valid: Bool[Tensor, "*batch k"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Return the divergence, nats."""
        return divergence.skewed(
            student_logp, teacher_logp, valid, alpha=self.alpha, direction=self.direction
        )
