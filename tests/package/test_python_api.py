"""The README's Python program is the command's default run: the same parts, and the same numbers when it runs."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.building import run_from
from opd_lightning.callbacks.samples import transcript
from opd_lightning.commands import plain
from opd_lightning.paths import CONF_DIR
from package.readme import python_program, run_here, run_program, substituted

SHORT = {
    r"Trainer\(max_steps=\d+": "Trainer(max_steps=4",
    r"prompts_per_collection=\d+": "prompts_per_collection=4",
    r"steps_per_collection=\d+": "steps_per_collection=2",
    r"max_new_tokens=\d+": "max_new_tokens=40",
    r"problems=\d+": "problems=4",
}
OVERRIDES = [
    "trainer.max_steps=4",
    "collector.prompts_per_collection=4",
    "collector.steps_per_collection=2",
    "rollout.max_new_tokens=40",
    "evaluation.settings.max_new_tokens=40",
    "evaluation.settings.problems=4",
]
# What the two runs leave behind, not what they do.
LOGS = {r"num_sanity_val_steps=0": "num_sanity_val_steps=0, logger=csv, log_every_n_steps=1"}
QUIET = ["callbacks.samples.every_steps=1", "trainer.enable_progress_bar=false", "evaluation.teacher=false"]


def train_rows(path):
    """Rows of metrics.csv with a loss, seconds and speeds left out."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return [
        {name: float(value) for name, value in row.items() if value and not name.startswith("time/")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The command and the program, four optimizer steps on two collections."""
    command = run_here("opd_lightning.train", OVERRIDES + QUIET, tmp_path_factory.mktemp("command"))
    assert command.code == 0, command.err
    folder = tmp_path_factory.mktemp("python")
    program = substituted(python_program(), SHORT | LOGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = run_program(program, csv=CSVLogger(folder, name="", version=""))
    return command, names, folder


def test_same_losses(pair):
    command, _, folder = pair
    expected, got = train_rows(command.run / "metrics.csv"), train_rows(folder / "metrics.csv")
    assert len(expected) == 4
    assert len({row["train/loss"] for row in expected}) == 4
    first, third = (
        row for row in expected if "rollout/behavior_logp" in row
    )  # two collections, each said once
    assert first["rollout/behavior_logp"] != third["rollout/behavior_logp"]
    watched = {
        "train/skipped_steps",
        "train/alarms",
        "rollout/length_share",
    }  # the command's guard and alarms
    assert watched <= expected[0].keys()
    for whole, other in zip(expected, got, strict=True):
        row = {name: value for name, value in whole.items() if name not in watched}
        assert row.keys() == other.keys()
        assert other == pytest.approx(row, abs=1e-6, rel=1e-6)


def test_same_rollouts(pair):
    """The last collection's responses, letter by letter."""
    command, names, _ = pair
    events = EventAccumulator(str(command.run)).Reload()
    (*_, last) = events.Tensors("rollout/samples/text_summary")
    text = last.tensor_proto.string_val[0].decode()
    assert last.step == 3  # that of the last step, which began after three
    assert text == transcript(names["run"].data.report.graded, 4)
    assert len(text) > 200


def test_same_weights(pair):
    command, names, _ = pair
    saved = load_file(command.run / "student" / "model.safetensors")
    trained = names["run"].module.student.model.state_dict()
    assert saved
    for name, value in saved.items():
        torch.testing.assert_close(trained[name], value, atol=1e-6, rtol=0, msg=name)


def test_same_evaluation(pair):
    command, names, _ = pair
    after = json.loads((command.run / "summary.json").read_text())["evaluations"]["4"]
    got = {name: float(value) for name, value in names["trainer"].callback_metrics.items()}
    assert after.keys() <= got.keys()
    assert {name: got[name] for name in after} == pytest.approx(after, abs=1e-6)


def test_same_parts(tmp_path, monkeypatch):
    """At full size: every number of the program is the configuration's."""
    monkeypatch.chdir(tmp_path)
    names = run_program(substituted(python_program(), {r"trainer\.fit\(.*\)": ""}))
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("train")
    mine, theirs = names["run"], run_from(config)
    assert mine.module.objective == theirs.module.objective
    assert mine.module.make_scheduler == theirs.module.make_scheduler
    assert described(mine.module.make_optimizer) == described(theirs.module.make_optimizer)
    assert mine.data.evaluation == theirs.data.evaluation
    for name in ("task", "engine", "rollout", "stop_ids", "prompts_per_collection", "steps_per_collection"):
        assert getattr(mine.data.collector, name) == getattr(theirs.data.collector, name), name
    for name in ("score_rows", "probe_rows"):
        assert getattr(mine.data.collector, name) == getattr(theirs.data.collector, name), name
    for prompts in (lambda run: run.data.collector.prompts, lambda run: run.data.validation):
        for name in ("problems", "max_tokens", "long", "seed"):
            assert getattr(prompts(mine), name) == getattr(prompts(theirs), name), name
    for scorer in (lambda run: run.module.student, lambda run: run.teacher.scorer):
        one, other = scorer(mine).state_dict(), scorer(theirs).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    trainer, settings = names["trainer"], plain(config.trainer)
    for name in ("max_steps", "accumulate_grad_batches", "gradient_clip_val"):
        assert getattr(trainer, name) == settings[name], name
    assert trainer.precision == settings["precision"]


def described(maker: partial) -> tuple:
    """A partial's function and arguments, lists as tuples."""
    return (
        maker.func,
        maker.args,
        {k: tuple(v) if isinstance(v, list) else v for k, v in maker.keywords.items()},
    )
