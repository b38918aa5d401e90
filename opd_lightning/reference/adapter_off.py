"""The student without its adapters."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.loading import Loading, SharedScorer
from opd_lightning.lora import adapted, adapters_off
from opd_lightning.types import Scores, TokenBatch, Want


@dataclass(frozen=True, kw_only=True)
class AdapterOff:
    """The starting student as the reference R, without a copy: the student's own model with its adapters off."""

    def load(self, loading: Loading) -> AdapterOffScorer:
        """Return the scorer that turns the adapters off for each of its forwards.

        Raises:
            ConfigError: the student has no adapters.
        """
        if not adapted(loading.student.model):
            raise ConfigError(
                "`reference` must be initial or path for a student without adapters, got adapter_off; "
                "use reference=initial, or student/lora=default"
            )
        return AdapterOffScorer(loading.student)


class AdapterOffScorer(SharedScorer):
    """Scores with the student's frozen weights alone."""

    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Score the tokens as the starting student does."""
        with adapters_off(self.scorer.model):
            return super().__call__(tokens, want, support_ids)
