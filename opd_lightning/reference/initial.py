"""The student as it started."""

from __future__ import annotations

from dataclasses import dataclass

from opd_lightning.loading import FrozenScorer, Loading


@dataclass(frozen=True, kw_only=True)
class Initial:
    """The starting student, loaded a second time from ``student.path`` and never from a checkpoint."""

    def load(self, loading: Loading) -> FrozenScorer:
        """Return the frozen starting student."""
        return FrozenScorer(loading.frozen(loading.student_path, "student.path", loading.student_dtype))
