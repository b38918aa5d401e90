"""A frozen causal language model in this process."""

from __future__ import annotations

from dataclasses import dataclass

from opd_lightning.loading import FrozenScorer, Loading
from opd_lightning.protocols import Scoring
from opd_lightning.serving.identity import weights_digest
from opd_lightning.teacher.cached import cached

__all__ = ["FrozenScorer", "LocalTeacher"]


@dataclass(frozen=True, kw_only=True)
class LocalTeacher:
    """Names a teacher that transformers can load, by folder or hub name.

    Args:
        path: folder, hub name, or ``builtin:task/teacher``.
        dtype: torch dtype of the weights; reductions are in float32 whatever it is.
        scoring_temperature: None for the student's, which is the only one that is accepted.
        cache: folder of a cache of its scores; see :class:`~opd_lightning.teacher.cached.CachedScorer`.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
    """

    path: str
    dtype: str
    scoring_temperature: float | None = None
    cache: str | None = None
    trust_remote_code: bool = False

    @property
    def gives_hidden(self) -> bool:
        """Hidden states are not cached."""
        return self.cache is None

    def load(self, loading: Loading) -> Scoring:
        """Load the model, frozen and in evaluation mode.

        Raises:
            ConfigError: another scoring temperature than the student's; nothing that can be loaded lies at
                ``path``, or its head is not supported.
        """
        loading.check_temperature(self.scoring_temperature, "teacher.scoring_temperature")
        scorer = FrozenScorer(loading.frozen(self.path, "teacher.path", self.dtype, self.trust_remote_code))
        if self.cache is None:
            return scorer
        return cached(scorer, self.cache, weights_digest(scorer.scorer.model), loading)
