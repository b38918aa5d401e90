"""The masks that keep the tokens of largest divergence or entropy: ESR's selector baselines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional import divergence
from opd_lightning.functional.selection import top_positions
from opd_lightning.mask._numbers import collected, require_count, tokens_at
from opd_lightning.schedule import Schedule
from opd_lightning.types import Experience, FullTerm, Needs
from opd_lightning.world import World

_REVERSE = FullTerm("teacher", divergence.reverse_kl)
_FORWARD = FullTerm("teacher", divergence.forward_kl)
_FACTORS: dict[str, tuple[str, ...]] = {
    "reverse_kl": ("reverse",),
    "forward_kl": ("forward",),
    "student_entropy": ("student",),
    "teacher_entropy": ("teacher",),
    "entropy_product": ("student", "teacher"),
    "kl_entropy": ("reverse", "student"),
    "kl_entropies": ("reverse", "student", "teacher"),
}


@dataclass(frozen=True, kw_only=True)
class TopPositions:
    """Keeps the min(n, count) tokens of largest score among a response's n tokens still in the loss.

    Scores, all exact over the vocabulary, of both models as they were at collection, nats: RKL = KL(S||T),
    FKL = KL(T||S), the entropies H_S and H_T, H_S H_T (``entropy_product``), RKL H_S (``kl_entropy``) and
    RKL H_S H_T (``kl_entropies``). They are the selectors that ESR compares its prefix with (arXiv 2605.27028);
    one version of its code ranks by FKL where the paper says RKL, so both are here. Of equal scores the
    earlier token stays.

    ``count`` is a number or a schedule; the paper's are 100 and 200.

    Raises:
        ConfigError: an unknown score, or a count below 1.
    """

    score: str
    count: float | Schedule

    def __post_init__(self) -> None:
        known = self.score in _FACTORS
        require(known, "mask.top.score", f"be one of {', '.join(_FACTORS)}", self.score, "use reverse_kl")
        require_count(self.count, f"mask.top_{self.score}.count")

    @property
    def needs(self) -> Needs:
        """The student's entropy and the divergence, where the score has them."""
        factors = _FACTORS[self.score]
        terms = {"reverse": _REVERSE, "forward": _FORWARD}
        return Needs(
            collected_entropy="student" in factors,
            teacher_entropy="teacher" in factors,
            collected_full=frozenset(terms[f] for f in factors if f in terms),
        )

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the tokens that stay."""
        full = experience.collected_full
        read = {
            "student": lambda: collected(experience.collected_entropy, "collected_entropy"),
            "teacher": lambda: collected(experience.teacher_entropy, "teacher_entropy"),
            "reverse": lambda: collected(full.get(_REVERSE), "collected_full"),
            "forward": lambda: collected(full.get(_FORWARD), "collected_full"),
        }
        score = torch.stack([read[factor]() for factor in _FACTORS[self.score]]).prod(0)
        return top_positions(score, inside, tokens_at(self.count, experience.progress))
