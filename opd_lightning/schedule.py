"""Numbers that change in the course of a run: pure functions of progress in [0, 1].

Progress is the share of the planned optimizer steps already done, the only clock that a schedule
sees. A field that may be scheduled is a ``float | Schedule``; :func:`value_at` reads either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from opd_lightning.errors import require


@runtime_checkable
class Schedule(Protocol):
    """A monotone number over a run: between ``value(0)`` and ``value(1)`` at all times."""

    def value(self, progress: float) -> float:
        """Return the number at ``progress`` in [0, 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same number throughout."""

    at: float

    def __post_init__(self) -> None:
        _require_numbers(at=self.at)

    def value(self, progress: float) -> float:
        """Return ``at``."""
        return self.at


@dataclass(frozen=True, kw_only=True)
class Linear:
    """From ``start`` to ``end`` on a straight line over the first part ``over`` of the run, then ``end``."""

    start: float
    end: float
    over: float = 1.0

    def __post_init__(self) -> None:
        _require_numbers(start=self.start, end=self.end, over=self.over)
        _require_part(self.over, "over")

    def value(self, progress: float) -> float:
        """Return start + (end - start) min(progress / over, 1)."""
        return self.start + (self.end - self.start) * min(progress / self.over, 1.0)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From ``start`` to ``end`` on half a cosine wave over the first part ``over``, then ``end``."""

    start: float
    end: float
    over: float = 1.0

    def __post_init__(self) -> None:
        _require_numbers(start=self.start, end=self.end, over=self.over)
        _require_part(self.over, "over")

    def value(self, progress: float) -> float:
        """Return end + (start - end) (1 + cos(pi min(progress / over, 1))) / 2."""
        wave = (1.0 + math.cos(math.pi * min(progress / self.over, 1.0))) / 2.0
        return self.end + (self.start - self.end) * wave


@dataclass(frozen=True, kw_only=True)
class Step:
    """``before`` until progress reaches ``at``, ``after`` from there on."""

    before: float
    after: float
    at: float

    def __post_init__(self) -> None:
        _require_numbers(before=self.before, after=self.after, at=self.at)
        require(0.0 <= self.at <= 1.0, "schedule.at", "be in [0, 1]", self.at, "give a share of the run")

    def value(self, progress: float) -> float:
        """Return ``before`` if progress < at, else ``after``."""
        return self.before if progress < self.at else self.after


def value_at(x: float | Schedule, progress: float) -> float:
    """Return the number ``x``, or the schedule ``x`` at ``progress``.

    Raises:
        ValueError: if ``progress`` lies outside [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    return x.value(progress) if isinstance(x, Schedule) else float(x)


def within(x: object, low: float, high: float) -> bool:
    """Return whether ``x`` is a number, or a schedule, that never leaves [low, high]: to check a field."""
    if not isinstance(x, (int, float, Schedule)):
        return False
    return all(low <= value_at(x, end) <= high for end in (0.0, 1.0))


def require_plain(x: object, field: str, remedy: str) -> None:
    """Refuse a schedule for what stays the same throughout a run, in words; the range is the field's own check."""
    require(not isinstance(x, Schedule), field, "be a number, not a schedule", x, remedy)


def _require_numbers(**fields: object) -> None:
    """Refuse what is no number; that it suits the field with the schedule is the field's own check."""
    for name, x in fields.items():
        number = isinstance(x, (int, float)) and not isinstance(x, bool) and not math.isnan(x)
        remedy = "give one (infinity is inf on the command line and .inf in a yaml)"
        require(number, f"schedule.{name}", "be a number", x, remedy)


def _require_part(over: float, name: str) -> None:
    require(0.0 < over <= 1.0, f"schedule.{name}", "be in (0, 1]", over, "give a share of the run")
