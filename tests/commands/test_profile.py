"""``debug=profile``: what it writes, that its numbers are the run's, and what it refuses."""

from __future__ import annotations

import csv
import gzip
import json
import re

import lightning as L
import pytest
import torch
from test_trainer import Toy
from torch.autograd.profiler_util import EventList

from commands.running import here
from opd_lightning.callbacks.profile import Profile, operator_table, phase_table

SHORT = [
    "debug=profile",
    "collector.prompts_per_collection=8",
    "collector.steps_per_collection=2",
    "rollout.max_new_tokens=24",
    "evaluation.settings.max_new_tokens=8",
    "trainer.accumulate_grad_batches=2",
    "callbacks.profile.warmup_steps=1",
    "callbacks.profile.steps=3",
]
"""Two steps of warm-up, four that are timed, two that are traced."""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return here("train", *SHORT, folder=tmp_path_factory.mktemp("profile") / "run")


def cells(text: str) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cell."""
    rows = re.findall(r"^\| (.+) \|$", text, re.MULTILINE)
    split = [[cell.strip() for cell in row.split("|")] for row in rows]
    return {first: rest for first, *rest in split}


def test_it_ends_after_its_windows_and_says_where_they_are(done):
    assert done.summary["optimizer_steps"] == 8
    assert f"profile.md and trace.json.gz (ui.perfetto.dev) are in {done.folder}" in done.out
    assert "| generate |" in done.out


def test_the_table_is_of_the_timed_steps(done):
    """Tokens are those that metrics.csv has for steps 3 to 6; shares add up."""
    text = (done.folder / "profile.md").read_text()
    assert text.startswith("# Profile of 4 optimizer steps")
    rows = cells(text)
    with (done.folder / "metrics.csv").open() as file:
        trained = [float(row["train/tokens"]) for row in csv.DictReader(file) if row["train/tokens"]]
    assert len(trained) == 8
    assert int(rows["train"][2]) == sum(trained[2:6])
    assert int(rows["generate"][2]) == int(rows["score"][2]) == sum(trained[2:6])
    phases = ("train", "generate", "score", "probe", "other: grading, cutting, logging")
    assert sum(float(rows[name][0]) for name in phases) == pytest.approx(float(rows["all"][0]), abs=0.005)
    assert all(float(rows[name][0]) > 0 for name in phases)
    peak = done.summary["peak_tflops"]
    assert f"Utilisation is of {peak:.4g} TFLOP/s." in text
    for name in ("train", "generate", "score", "probe", "all"):
        share = float(rows[name][5].removesuffix("%")) / 100
        assert share == pytest.approx(float(rows[name][4]) / peak, abs=6e-4)
        assert 0 < share < 1
    assert re.search(r"Peak memory: \d{3,} MB of this process", text)


def test_the_trace_has_the_phases_of_one_collection(done):
    with gzip.open(done.folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    ranges = [e["name"] for e in events if e.get("cat") == "user_annotation" and "phase" in e["name"]]
    assert ranges.count("phase train") == 4  # two steps of two micro-batches
    assert ranges.count("phase generate") == 1
    assert {"phase score", "phase probe"} <= set(ranges)
    assert any(e["name"] == "aten::mm" for e in events)
    rows = cells((done.folder / "profile.md").read_text())
    assert int(rows["`aten::mm`"][0]) == sum(e["name"] == "aten::mm" for e in events)


def test_writing_is_no_training(done):
    """What the files take is charged to a phase of its own."""
    assert done.summary["seconds_by_phase"]["profile"] > 0


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        (["trainer.max_steps=7"], "trainer.max_steps", ["at least 8", "4 optimizer steps after 2", "got 7"]),
        (["callbacks.profile.steps=0"], "callbacks.profile.steps", ["at least 1", "got 0"]),
        (["callbacks.profile.warmup_steps=-1"], "callbacks.profile.warmup_steps", ["got -1"]),
        (["callbacks.profile.operators=some"], "callbacks.profile.operators", ["got 'some'"]),
    ],
)
def test_refusals(tmp_path, overrides, field, words):
    sentence = here("train", *SHORT, *overrides, folder=tmp_path / "run").sentence
    assert sentence.startswith(f"error: `{field}`")
    assert all(word in sentence for word in words)


def test_an_error_leaves_no_profiler_behind(tmp_path):
    class Fails(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                raise RuntimeError("out of memory")

    made = Profile(warmup_steps=0, steps=1, operators=5)
    toy = Toy()
    with pytest.raises(RuntimeError, match="out of memory"):
        toy.fit(9, made, Fails(), default_root_dir=str(tmp_path))
    assert not toy.data.collector.clock.listeners
    with torch.profiler.profile() as profiler:
        torch.ones(3) + 1
    assert any(event.key == "aten::add" for event in profiler.key_averages())


def test_tables_of_known_numbers():
    seconds = {"train": 1.0, "generate": 2.0, "idle": 0.0}
    rows = cells("\n".join(phase_table(seconds, {"generate": 50}, {"generate": 3e12}, 4.0, 6.0)))
    assert [name for name in rows if name in ("generate", "train")] == ["generate", "train"]
    assert rows["generate"] == ["2.000", "50.0%", "50", "25", "1.5", "25.0%"]
    assert rows["train"] == ["1.000", "25.0%", "", "", "", ""]
    assert rows["other: grading, cutting, logging"][:2] == ["1.000", "25.0%"]
    assert rows["all"][-2:] == ["0.75", "12.5%"]
    assert "idle" not in rows


def test_operators_are_in_order_of_their_own_time():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            torch.ones(200, 200) @ torch.ones(200, 200)
    events = profiler.key_averages()
    assert isinstance(events, EventList)
    rows = cells(operator_table(list(events), 2))
    named = [name for name in rows if name.startswith("`")]
    longest = sorted(events, key=lambda e: -e.self_cpu_time_total)[:2]
    assert named == [f"`{event.key}`" for event in longest]
    assert rows["`aten::mm`"][0] == "3"
