"""Steps that are not finite are left out: by real NaNs in one micro-batch of several."""

from __future__ import annotations

import json
import math
from functools import partial

import lightning as L
import pytest
import torch
from test_trainer import MATCHING, SAMPLED, Toy, flat
from tiny import random_experience

from opd_lightning.callbacks.guard import Guard, described
from opd_lightning.errors import ConfigError, RunStopped


class Poison(L.Callback):
    """Puts a NaN among the teacher's log-probs of one micro-batch of certain steps."""

    def __init__(self, steps, micro_batch: int = 1, accumulate: int = 3) -> None:
        self.steps, self.place, self.accumulate = set(steps), micro_batch, accumulate
        self.poisoned = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step in self.steps and batch_idx % self.accumulate == self.place:
            batch.teacher_taken_logp[0, 0] = math.nan
            self.poisoned.append(batch)


class After(L.Callback):
    """Keeps weights, the optimizer's state and what was logged, after each optimizer step."""

    def __init__(self) -> None:
        self.weights, self.states, self.logged, self._seen = [], [], [], 0

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.weights.append(flat(pl_module.student))
            state = trainer.optimizers[0].state.values()
            self.states.append(sum(float(v.double().sum()) for s in state for v in s.values()))
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class Follower:
    def __init__(self) -> None:
        self.calls = []

    def follow(self, student, progress) -> None:
        self.calls.append(progress)


def guarded(folder, steps, bad, *, limit: int = 3, guard=None, **more):
    toy = Toy(SAMPLED, optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1))
    follower, after = Follower(), After()
    toy.module.__dict__["follower"] = follower
    guard = guard or Guard(limit=limit, folder=str(folder))
    poison = Poison(bad)
    try:
        toy.fit(steps, poison, guard, after, accumulate=3, gradient_clip_val=1.0, **more)
    finally:
        toy.after, toy.guard, toy.follower, toy.poison = after, guard, follower, poison
    return toy


def test_a_nan_in_one_micro_batch_skips_its_step_alone(tmp_path):
    toy = guarded(tmp_path, 4, [1])
    weights, states = toy.after.weights, toy.after.states
    assert torch.equal(weights[1], weights[0])  # weight decay included
    assert states[1] == states[0]  # Adam's step count too
    assert not torch.equal(weights[2], weights[1])
    assert all(bool(w.isfinite().all()) for w in weights)
    logged = [row["train/skipped_steps"] for row in toy.after.logged]
    assert logged == [0, 1, 1, 1]
    # What was logged is what was there.
    assert [math.isfinite(row["train/loss"]) for row in toy.after.logged] == [True, False, True, True]
    assert [math.isfinite(row["train/grad_norm"]) for row in toy.after.logged] == [True, False, True, True]
    assert len(toy.follower.calls) == 3


def test_the_offending_responses_are_written(tmp_path):
    toy = guarded(tmp_path, 2, [1])
    (path,) = tmp_path.iterdir()
    assert path.name == "step_1_rank0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (batch,) = toy.poison.poisoned
    assert len(rows) == len(batch.share)
    assert [row["not_finite"] for row in rows] == [["teacher_taken_logp"], *[[]] * (len(rows) - 1)]
    assert rows[0]["response_ids"] == batch.rollout.ids[0][batch.rollout.mask[0]].tolist()
    assert rows[0]["prompt_ids"] == batch.rollout.prompt.ids[0][batch.rollout.prompt.mask[0]].tolist()
    assert isinstance(rows[0]["response"], str)
    assert math.isnan(rows[0]["teacher_logp"][0])


def test_skips_one_after_another_stop_the_run_with_good_weights(tmp_path):
    with pytest.raises(RunStopped, match=r"got 2 optimizer steps one after another"):
        guarded(tmp_path, 9, [0, 2, 3, 4], limit=2)
    guard = Guard(limit=2, folder=str(tmp_path))
    with pytest.raises(RunStopped):
        toy = guarded(tmp_path, 9, [0, 2, 3, 4], guard=guard)
    assert guard.state_dict() == {"skipped": 3, "in_a_row": 2}
    other = Guard(limit=2, folder=str(tmp_path))
    other.load_state_dict(guard.state_dict())
    # Goes on counting: a good step resets the row, a bad one stops again.
    toy = guarded(tmp_path, 3, [1], guard=other)
    assert other.state_dict() == {"skipped": 4, "in_a_row": 0}
    assert bool(toy.weights().isfinite().all())


def test_a_gradient_that_is_not_finite_alone_skips_too(tmp_path):
    class Broken(L.Callback):
        def on_after_backward(self, trainer, pl_module) -> None:
            if trainer.global_step == 1:
                next(pl_module.student.parameters()).grad.fill_(math.inf)

    toy = Toy(MATCHING)
    after, guard = After(), Guard(limit=1, folder=str(tmp_path))
    guard.limit = 9
    toy.fit(3, Broken(), guard, after, accumulate=2)
    assert torch.equal(after.weights[1], after.weights[0])
    assert guard.skipped == 1
    rows = (tmp_path / "step_1_rank0.jsonl").read_text().splitlines()
    assert {json.loads(row)["micro_batch"] for row in rows} == {0, 1}  # nobody knows whose it was


def test_a_run_without_trouble_is_the_same_run(tmp_path):
    plain, watched = Toy(MATCHING), Toy(MATCHING)
    plain.fit(2, accumulate=2)
    watched.fit(2, Guard(limit=1, folder=str(tmp_path / "none")), accumulate=2)
    assert torch.equal(plain.weights(), watched.weights())
    assert not (tmp_path / "none").exists()


def test_collected_numbers_that_are_not_finite_are_named():
    experience = random_experience(3)
    experience.support_teacher_logp[1, 0, 2] = -math.inf
    experience.teacher_taken_logp[2, ~experience.rollout.mask[2]] = math.nan  # padding says nothing
    assert [row["not_finite"] for row in described(experience)] == [[], ["support_teacher_logp"], []]


@pytest.mark.parametrize("limit", [0, -1, 1.5, None, True])
def test_a_limit_that_is_none_is_refused(limit, tmp_path):
    with pytest.raises(ConfigError, match=r"`callbacks.guard.limit` must be at least 1 step"):
        Guard(limit=limit, folder=str(tmp_path))
