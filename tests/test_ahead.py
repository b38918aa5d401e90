"""Generation one collection ahead: which weights write, score and are counted, in this thread or beside it."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field, replace
from threading import Event, Lock
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_trainer import SAMPLED, Toy, Watch, sequence_divergence
from tiny import random_rollout
from torch import Tensor

from opd_lightning import data
from opd_lightning.ahead import Ahead
from opd_lightning.buffer import micro_batches
from opd_lightning.clock import PhaseClock
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.protocols import DrawsApart
from opd_lightning.regularizer.importance import Importance
from opd_lightning.schedule import Linear
from opd_lightning.types import Want
from opd_lightning.world import World

PLAIN = TransformersEngine(ahead=1)
WEIGHTED = replace(SAMPLED, regularizers={"importance": Importance(cap=2.0)})


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Draws from a copy of the student, as a server does: slowly, or not at all after so many draws."""

    ahead: int = 1
    seconds: float = 0.0
    fails_after: int | None = None
    held: dict[str, Any] = field(default_factory=lambda: {"draws": 0, "busy": Lock(), "stop": Event()})

    def bind(self, model, version):
        assert not self.held["busy"].locked(), "told of other weights while it draws"

    def rest(self):
        pass

    def follow(self, model, prompts):
        assert not self.held["busy"].locked(), "sent other weights while it draws"
        self.held["copy"] = copy.deepcopy(model).eval()

    def draw(self, model, prompts, sampling):
        with self.held["busy"]:
            if threading.current_thread().name == "ahead":
                self.held["stop"].wait(self.seconds)
            self.held["draws"] += 1
            if self.held["draws"] == self.fails_after:
                raise ConfigError("`engine.url` must answer, got nothing")
            self.held["threads"] = self.held.get("threads", set()) | {threading.current_thread().name}
            return TransformersEngine().generate(self.held["copy"], prompts, sampling)

    def generate(self, model, prompts, sampling):
        self.follow(model, prompts)
        return self.draw(model, prompts, sampling)


class Weights(Watch):
    """Beside the micro-batches, the student as it was before each optimizer step, and what it thinks of them."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        self.students: list[Any] = []
        self.now: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.students.append(copy.deepcopy(self.toy.student))
        with torch.no_grad():
            self.now.append(self.toy.student(batch.rollout.tokens, Want(taken=True)).taken_logp)


def made(engine) -> Toy:
    toy = Toy(WEIGHTED, steps_per_collection=2)
    rollout = replace(toy.data.collector.rollout, loss_horizon=Linear(start=2, end=8))
    toy.data.collector = replace(toy.data.collector, engine=engine, rollout=rollout)
    return toy


def run(engine, callbacks=(), **more) -> tuple[Toy, Weights]:
    toy = made(engine)
    watch = Weights(toy)
    toy.fit(7, watch, *callbacks, **more)
    return toy, watch


@pytest.fixture(scope="module")
def plain():
    return run(PLAIN)


def test_responses_are_those_of_the_weights_one_collection_before(plain):
    """Seven steps, two on each collection: the second collection is as old as the first, then each is two steps old."""
    toy, watch = plain
    assert [b.rollout.version for b in watch.batches] == [0, 0, 0, 0, 2, 2, 4]
    assert [b.progress for b in watch.batches] == pytest.approx([0, 0, 2 / 7, 2 / 7, 4 / 7, 4 / 7, 6 / 7])
    behind = [step["rollout/versions_behind"] for step in watch.logged]
    assert behind == [0, 0, 2, 2, 2, 2, 2]
    fresh = replace(toy.data.collector, engine=TransformersEngine(), clock=PhaseClock())
    for number, version in ((1, 0), (2, 2), (3, 4)):
        steps, report = fresh.collect(
            watch.students[version].eval(), number, 2 * number / 7, version, World()
        )
        assert "rollout/versions_behind" not in report.sums
        for got, step in zip(watch.batches[2 * number :], steps, strict=False):
            (want,) = micro_batches(step, 1)
            for name in ("ids", "mask", "behavior_logp", "finish", "origin", "horizon"):
                assert torch.equal(getattr(got.rollout, name), getattr(want.rollout, name)), name
            assert got.rollout.prompt.seeds == want.rollout.prompt.seeds
    assert toy.data.collector.ahead.pending() is None  # nothing is written that no step will read


def test_scores_are_those_of_the_weights_that_training_begins_with(plain):
    """So S_scored / S_writer, the weight of `importance`, holds what training changed in between."""
    _, watch = plain
    for at, batch in enumerate(watch.batches):
        mask, collected = batch.rollout.mask, batch.collected_logp
        writer = watch.students[batch.rollout.version]
        with torch.no_grad():
            wrote = writer(batch.rollout.tokens, Want(taken=True)).taken_logp
        assert float((wrote - batch.rollout.behavior_logp)[mask].abs().max()) < 1e-4
        gap = float((collected - watch.now[at])[mask].abs().max())
        assert gap < 1e-4 if at % 2 == 0 else gap > 1e-3
        moved = float((collected - batch.rollout.behavior_logp)[mask].abs().max())
        assert moved < 1e-4 if at < 2 else moved > 1e-2
    assert [step["train/importance_cut"] > 0 for step in watch.logged[:2]] == [False, False]
    assert watch.logged[0]["train/importance"] == pytest.approx(1, abs=1e-3)
    assert abs(watch.logged[4]["train/importance"] - 1) > 1e-3


@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["fast", "slow"])
def test_an_engine_apart_draws_beside_training_and_changes_nothing(plain, seconds):
    engine = Apart(seconds=seconds)
    assert isinstance(engine, DrawsApart)
    toy, watch = run(engine)
    assert torch.equal(toy.weights(), plain[0].weights())
    assert [step["train/loss"] for step in watch.logged] == [step["train/loss"] for step in plain[1].logged]
    assert engine.held["threads"] == {"MainThread", "ahead"}
    assert engine.held["draws"] == 4
    clocks = [one.data.collector.clock for one in (toy, plain[0])]
    assert clocks[0].tokens == clocks[1].tokens
    assert clocks[0].tokens["generate"] == clocks[0].tokens["score"] > 0


def test_an_evaluation_waits_for_the_text_and_leaves_it_as_it_is(plain):
    toy, _ = run(Apart(seconds=0.3), limit_val_batches=1, val_check_interval=3)
    assert torch.equal(toy.weights(), plain[0].weights())


def test_ahead_0_asks_nothing_of_an_engine_before_its_time():
    engine = Apart(ahead=0)
    toy, watch = run(engine)
    assert [b.rollout.version for b in watch.batches] == [0, 0, 2, 2, 4, 4, 6]
    assert engine.held["threads"] == {"MainThread"}
    assert not any("rollout/versions_behind" in step for step in watch.logged)
    assert torch.equal(toy.weights(), run(TransformersEngine())[0].weights())


def test_what_goes_wrong_beside_training_ends_it_in_the_same_words():
    done: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            done.append(trainer.global_step)

    with pytest.raises(ConfigError, match=r"`engine\.url` must answer, got nothing"):
        run(Apart(fails_after=3), callbacks=[Count()])
    assert done[-1] == 4  # the third collection was begun with the second, and is read after it


def test_a_stop_waits_for_nobody(tmp_path, monkeypatch):
    """A run that ends by an error leaves its thread behind, for which neither its checkpoint nor its process waits."""

    class Stop(L.Callback):
        def on_train_batch_end(self, *_) -> None:
            raise RuntimeError("stopped")

    monkeypatch.setattr(data, "_LAST_SECONDS", 0.1)
    engine = Apart(seconds=60.0)
    toy = made(engine)
    saved = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(RuntimeError, match="stopped"):
        toy.fit(7, Stop(), saved, enable_checkpointing=True)
    (thread,) = [t for t in threading.enumerate() if t.name == "ahead"]
    assert thread.daemon
    (checkpoint,) = [torch.load(path, weights_only=False) for path in tmp_path.glob("*.ckpt")]
    (process,) = checkpoint[type(toy.data).__qualname__]["processes"]
    assert process["ahead"] is None
    engine.held["stop"].set()
    thread.join()
    number, rollout = toy.data.collector.ahead.pending()
    assert (number, rollout.version) == (1, 0)


def collect(collector, student, number, upcoming=0.5, version=0):
    return collector.collect(student, number, 0.5, version, World(), upcoming)


@pytest.mark.parametrize("engine", [PLAIN, Apart(seconds=0.2)], ids=["here", "apart"])
def test_what_is_pending_can_be_saved_and_given_back(engine, tmp_path):
    toy = Toy(WEIGHTED)
    first = replace(toy.data.collector, engine=engine)
    collect(first, toy.student.eval(), 0)
    number, rollout = first.ahead.pending()
    torch.save(rollout, tmp_path / "rollout")
    assert number == 1
    with torch.no_grad():
        for weight in toy.student.parameters():
            weight.mul_(1.1)
    (wanted,), _ = collect(first, toy.student, 1, None, version=1)
    other = Toy(WEIGHTED).data.collector
    other.ahead.restore(number, torch.load(tmp_path / "rollout", weights_only=False))
    (got,), report = collect(replace(other, engine=engine), toy.student, 1, None, version=1)
    assert torch.equal(got.rollout.ids, wanted.rollout.ids)
    assert torch.equal(got.rollout.behavior_logp, wanted.rollout.behavior_logp)
    assert torch.equal(got.collected_logp, wanted.collected_logp)
    # Here it was counted when it was written, by the clock whose state is in the checkpoint too.
    assert other.clock.tokens["generate"] == (0 if engine is PLAIN else int(rollout.mask.sum()))
    assert got.rollout.version == 0
    assert report.sums["rollout/versions_behind"] == (1.0, 1.0)


def test_text_of_another_collection_is_not_used():
    toy = Toy(WEIGHTED)
    collector = replace(toy.data.collector, engine=PLAIN)
    collect(collector, toy.student.eval(), 0)
    (step,), _ = collect(collector, toy.student, 5, None, version=9)
    assert step.rollout.version == 9


@pytest.mark.parametrize("ahead", [2, -1, True, 0.5, None])
def test_other_numbers_are_refused(ahead):
    with pytest.raises(ConfigError, match=r"`engine\.ahead` must be 0 or 1"):
        TransformersEngine(ahead=ahead)


def test_a_run_ahead_learns():
    toy = Toy(WEIGHTED, vocab=8, new=3, prompts=4, samples=8, stops=(2,))
    toy.data.collector = replace(toy.data.collector, engine=PLAIN)
    prompts = [toy.data.collector.prompts.stream([i]).ids for i in range(2)]
    before = sum(sequence_divergence(toy, p) for p in prompts)
    toy.fit(20)
    assert sum(sequence_divergence(toy, p) for p in prompts) < 0.5 * before


def test_what_was_taken_is_saved_until_it_is_experience():
    """A run that stops between generation and scoring: these weights could not write it again."""
    ahead, now, following = Ahead(), random_rollout(1), random_rollout(1)
    ahead.restore(3, now)
    assert ahead.take(3).rollout is now
    ahead.restore(4, following)
    assert ahead.pending() == (3, now)
    ahead.done()
    assert ahead.pending() == (4, following)
