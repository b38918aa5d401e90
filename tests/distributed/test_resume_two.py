"""A run of two processes goes on with two, as if nothing had happened, and with one, equal to rounding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_two_processes import STUDENT, Done, train

pytestmark = pytest.mark.slow

SHORT = [
    "collector.steps_per_collection=2",
    "callbacks.checkpoint.every_steps=1",
    "callbacks.checkpoint.keep=9",
]


def cut(whole: Path, folder: Path, step: int) -> None:
    """Leave what a run killed after ``step`` optimizer steps would have left."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text((whole / "config.yaml").read_text().replace(str(whole), str(folder)))
    (folder / "metrics.csv").write_text((whole / "metrics.csv").read_text())
    name = f"step={step}.ckpt"
    (folder / "checkpoints" / name).write_bytes((whole / "checkpoints" / name).read_bytes())


def go_on(whole: Path, folder: Path, *overrides: str) -> Done:
    # From within a collection: each process has a part of it that was not learned from yet.
    cut(whole, folder, 3)
    done = train(folder, f"student.path={STUDENT}", *SHORT, *overrides, "resume=auto")
    assert done.code == 0, done.err
    assert "from step=3.ckpt" in done.out
    assert "Traceback" not in done.err
    return done


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_goes_on(strategy, tmp_path):
    two = (f"strategy={strategy}", "trainer.devices=2")
    whole = train(tmp_path / "whole", f"student.path={STUDENT}", *SHORT, *two)
    assert whole.code == 0, whole.err

    again = go_on(whole.folder, tmp_path / "two", *two)
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())
    assert again.rows == whole.rows

    alone = go_on(whole.folder, tmp_path / "one")
    begun = load_file(STUDENT / "model.safetensors")
    for name, weight in whole.weights.items():
        moved = (weight - begun[name]).norm() if name in begun else weight.norm()
        assert (alone.weights[name] - weight).norm() <= 1e-4 * moved + 1e-9, name
    assert alone.rows.keys() == whole.rows.keys()
    for step, expected in whole.rows.items():
        assert alone.rows[step] == pytest.approx(expected, rel=2e-5, abs=1e-6), f"step {step}"
    assert json.loads((alone.folder / "resumed.jsonl").read_text())["step"] == 3
