"""Alarms on real runs: what they see, what they shorten, and that they stop."""

from __future__ import annotations

import logging
import math

import lightning as L
import pytest
from commands.running import here
from test_trainer import SAMPLED, Toy

from opd_lightning.callbacks.alarms import Alarm, Alarms
from opd_lightning.errors import ConfigError, RunStopped
from opd_lightning.types import Finish

NEVER = (1_000_000,)  # no id ends a response


def alarm(**changes) -> Alarm:
    plain = {
        "metric": "rollout/truncation",
        "above": 0.5,
        "below": None,
        "window": 1,
        "action": "warn",
    }
    return Alarm(**plain | changes)


def alarms(least: int = 3, **named: Alarm) -> Alarms:
    return Alarms(watch=named, least_tokens=least)


class Lengths(L.Callback):
    """The longest response of each optimizer step, and how its responses ended."""

    def __init__(self) -> None:
        self.longest, self.finishes, self.logged = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.longest.append(int(batch.rollout.lengths.max()))
        self.finishes.append(set(batch.rollout.finish.tolist()))

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def watched(steps: int, callback: Alarms, toy: Toy | None = None) -> Lengths:
    seen = Lengths()
    (toy or Toy(SAMPLED, new=16, stops=NEVER)).fit(steps, seen, callback)
    return seen


def test_shorten_halves_from_the_next_collection_down_to_the_least():
    callback = alarms(length=alarm(metric="rollout/length", above=0.0, action="shorten"))
    seen = watched(5, callback)
    assert seen.longest == [16, 8, 4, 3, 3]
    assert callback.fired == 5
    assert [row["rollout/length_share"] for row in seen.logged] == [0.5, 0.25, 0.125, 0.0625, 0.03125]


def test_what_is_shortened_is_not_truncated():
    seen = watched(4, alarms(cut=alarm(action="shorten")))
    assert seen.longest == [16, 8, 8, 8]
    assert seen.finishes == [{Finish.LENGTH}, *[{Finish.HORIZON}] * 3]
    assert [row["train/alarms"] for row in seen.logged] == [1, 1, 1, 1]


def test_warnings_change_nothing_and_count_each_window_anew(caplog):
    callback = alarms(cut=alarm(window=2))
    with caplog.at_level(logging.WARNING):
        seen = watched(5, callback)
    assert seen.longest == [16] * 5
    assert callback.fired == 2
    found = [r.getMessage() for r in caplog.records if "alarm cut" in r.getMessage()]
    assert found[0] == "step 1, alarm cut: rollout/truncation is 1 over 2 collections, over 0.5"
    assert len(found) == 2


def test_a_collection_is_looked_at_once():
    callback = alarms(cut=alarm(window=1))
    watched(4, callback, Toy(SAMPLED, new=8, stops=NEVER, steps_per_collection=2))
    assert callback.fired == 2


def test_a_side_without_a_threshold_is_quiet():
    low = alarm(metric="student/entropy", above=None, below=1e-6)
    callback = alarms(low=low, high=alarm(metric="student/entropy", above=1e-6))
    watched(2, callback)
    assert callback.fired == 2  # the high one


def test_stop_ends_the_run_behind_a_whole_step():
    callback = alarms(cut=alarm(window=2, action="stop"))
    toy = Toy(SAMPLED, new=8, stops=NEVER)
    with pytest.raises(
        RunStopped, match=r"`callbacks.alarms.watch.cut` must not go off, got rollout/truncation is 1"
    ):
        watched(5, callback, toy)
    assert toy.module.trainer.global_step == 2


def test_a_checkpoint_keeps_what_was_seen_and_shortened():
    first = alarms(cut=alarm(window=3), length=alarm(metric="rollout/length", above=15.0, action="shorten"))
    watched(2, first)
    state = first.state_dict()
    assert state == {"fired": 1, "share": 0.5, "history": {"cut": [1.0, 0.0], "length": [8.0]}}
    again = alarms(cut=alarm(window=3), length=alarm(metric="rollout/length", above=15.0, action="shorten"))
    again.load_state_dict(state)
    assert watched(1, again).longest == [8]
    assert again.state_dict()["history"]["cut"] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metric": "time/score"}, "`callbacks.alarms.watch.*.metric` must begin with rollout/"),
        ({"above": None}, "`callbacks.alarms.watch.*.above` must be a number where below is null"),
        ({"above": math.nan}, "`callbacks.alarms.watch.*.above` must be a number or null"),
        ({"window": 0}, "`callbacks.alarms.watch.*.window` must be at least 1 collection"),
        ({"action": "panic"}, "`callbacks.alarms.watch.*.action` must be one of warn, shorten, stop"),
    ],
)
def test_an_alarm_that_cannot_work_is_refused(changes, sentence):
    with pytest.raises(ConfigError) as refused:
        alarm(**changes)
    assert sentence in str(refused.value)


@pytest.mark.slow
def test_the_command_stops_with_a_sentence_and_a_checkpoint(tmp_path):
    words = ["callbacks.alarms.watch.truncation.window=1", "callbacks.alarms.watch.truncation.action=stop"]
    done = here("train", "debug=fast", "evaluation.teacher=false", *words, folder=tmp_path)
    assert done.code == 2, done.err
    assert "error: `callbacks.alarms.watch.truncation` must not go off, got rollout/truncation is" in done.err
    assert "Traceback" not in done.out + done.err
    assert any((tmp_path / "checkpoints").iterdir())
