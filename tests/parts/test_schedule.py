"""Schedules: numerics.md section 11, point 27."""

import dataclasses
import math

import pytest

from opd_lightning.errors import ConfigError
from opd_lightning.schedule import Constant, Cosine, Linear, Schedule, Step, value_at, within

ALL = [
    Constant(at=0.3),
    Linear(start=1.0, end=0.0),
    Linear(start=0.0, end=2.0, over=0.5),
    Cosine(start=1.0, end=0.0),
    Cosine(start=0.0, end=2.0, over=0.5),
    Step(before=1.0, after=0.0, at=0.5),
]


# numerics 11.27
def test_known_numbers():
    assert [value_at(0.7, p) for p in (0.0, 1.0)] == [0.7, 0.7]
    assert [Constant(at=0.3).value(p) for p in (0.0, 0.5, 1.0)] == [0.3] * 3
    assert [Linear(start=2.0, end=1.0).value(p) for p in (0.0, 0.25, 1.0)] == [2.0, 1.75, 1.0]
    warm = Linear(start=0.0, end=1.0, over=0.5)
    assert [warm.value(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    # (1 + cos(pi/3)) / 2 = .75
    cosine = Cosine(start=1.0, end=0.0)
    got = [cosine.value(p) for p in (0.0, 1 / 3, 0.5, 1.0)]
    assert got == pytest.approx([1.0, 0.75, 0.5, 0.0], abs=1e-12)
    half = Cosine(start=1.0, end=0.2, over=0.5)
    assert [half.value(p) for p in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


# numerics 11.27
def test_a_step_switches_exactly_there():
    switch = Step(before=1.0, after=3.0, at=0.5)
    assert [switch.value(p) for p in (0.0, math.nextafter(0.5, 0), 0.5, 1.0)] == [1.0, 1.0, 3.0, 3.0]
    assert Step(before=1.0, after=3.0, at=0.0).value(0.0) == 3.0
    assert Step(before=1.0, after=3.0, at=1.0).value(1.0) == 3.0


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_stays_between_its_ends_and_is_monotone(schedule):
    """What :func:`within` relies on."""
    assert isinstance(schedule, Schedule)
    values = [schedule.value(i / 100) for i in range(101)]
    ordered = sorted(values, reverse=values[0] > values[-1])
    assert values == ordered
    low, high = min(values), max(values)
    assert within(schedule, low, high)
    assert not within(schedule, low + 1e-9, high + 1)
    assert not within(schedule, low - 1, high - 1e-9)


def test_within_a_range():
    assert within(0, 0.0, 1.0)
    assert within(1.0, 0.0, 1.0)
    assert not within(1.1, 0.0, 1.0)
    assert not within(float("nan"), 0.0, 1.0)


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_is_a_share(progress):
    with pytest.raises(ValueError, match="progress must be in"):
        value_at(0.5, progress)


def test_refusals():
    for over in (0.0, 1.5):
        for kind in (Linear, Cosine):
            with pytest.raises(ConfigError, match=r"`schedule.over` must be in \(0, 1\]"):
                kind(start=0.0, end=1.0, over=over)
    with pytest.raises(ConfigError, match=r"`schedule.at` must be in \[0, 1\]"):
        Step(before=0.0, after=1.0, at=1.5)


@pytest.mark.parametrize("value", [".inf", None, True, float("nan"), [1]])
@pytest.mark.parametrize("made", ALL, ids=repr)
def test_what_is_no_number_is_named_by_its_field(made, value):
    for name in dataclasses.asdict(made):
        with pytest.raises(ConfigError, match=f"^`schedule.{name}` must be a number, got "):
            dataclasses.replace(made, **{name: value})
