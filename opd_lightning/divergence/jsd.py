"""Generalised Jensen-Shannon divergence."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional import divergence
from opd_lightning.schedule import require_plain


@dataclass(frozen=True, kw_only=True)
class JSD:
    """beta KL(T||M) + (1 - beta) KL(S||M) with M = beta T + (1 - beta) S (GKD, arXiv 2306.13649).

    ``beta`` = 0 is forward KL and 1 is reverse KL by name, not by limit: 0.001 is about 0.001 times
    forward KL. ``scaled`` divides by beta (1 - beta), and then 0.001 is about forward KL.

    Raises:
        ConfigError: if ``beta`` lies outside [0, 1] or ``scaled`` is no truth value.
    """

    beta: float
    scaled: bool = False

    def __post_init__(self) -> None:
        require_plain(self.beta, "divergence.beta", "use 0.5 for the symmetric divergence")
        require(
            isinstance(self.beta, (int, float)) and 0.0 <= self.beta <= 1.0,
            "divergence.beta",
            "be in [0, 1]",
            self.beta,
            "use 0.5 for the symmetric divergence",
        )
        require(
            isinstance(self.scaled, bool),
            "divergence.scaled",
            "be true or false",
            self.scaled,
            "use false for the published divergence",
        )

    @property
    def as_jsd(self) -> tuple[float, bool]:
        """``beta`` and ``scaled``: the head then takes the closed form."""
        return self.beta, self.scaled

    def __call__(
        self,
        student_logp: Float[Tensor, "*batch k"],
        teacher_logp: Float[Tensor, "*batch k"],
        valid: Bool[Tensor, "*batch k"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """Return the divergence, nats; in (0, 1) and unscaled, at most the entropy of a coin of bias beta."""
        return divergence.jsd(student_logp, teacher_logp, valid, beta=self.beta, scaled=self.scaled)
