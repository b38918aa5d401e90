"""``python -m opd_lightning.toy_gamma``: what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from commands.running import here
from opd_lightning.toy import picture
from opd_lightning.toy.summary import late

FEW = [
    "iterations=10",
    "trajectories=8",
    "micro_batches=4",
    "horizon=6",
    "teacher_iterations=5",
    "gammas=[0,1]",
]


def test_command(tmp_path):
    """Numbers, every update's variance, both pictures, and the claims on the screen."""
    pytest.importorskip("matplotlib")
    done = here("toy_gamma", *FEW, "seeds=[1,2]", folder=tmp_path / "run")
    assert done.code == 0, done.err
    names = {path.name for path in done.folder.iterdir()}
    assert {"results.json", "variance.csv", "variance.png", "visits.png"} <= names
    result = json.loads((done.folder / "results.json").read_text())
    assert [(row["seed"], row["task"]) for row in result["results"]] == [
        (1, "left"),
        (1, "right"),
        (2, "left"),
        (2, "right"),
    ]
    with (done.folder / "variance.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    mine = [float(r["gamma_1"]) for r in rows if (r["seed"], r["task"]) == ("2", "right")]
    expected = late(torch.tensor(mine)).item()
    assert result["results"][3]["late_median_variance"][1] == pytest.approx(expected, rel=1e-3)
    assert "gamma 1 drifts to wrong regions" in done.out
    for name in ("variance.png", "visits.png"):
        assert (done.folder / name).stat().st_size > 10_000


def test_command_without_matplotlib(tmp_path, monkeypatch):
    """Refused before anything is computed, or asked for no pictures."""
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    refusal = here("toy_gamma", *FEW, folder=tmp_path / "no").sentence
    assert refusal.startswith("error: `pictures` must")
    assert "[notebooks]" in refusal
    done = here("toy_gamma", *FEW, "pictures=false", folder=tmp_path / "yes")
    assert done.code == 0, done.err
    assert not list(done.folder.glob("*.png"))


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("+gama=1", "gama"),
        ("sigma=1", "sigma"),
        ("pictures=3", "pictures"),
        ("seeds=[x]", "seeds"),
        ("seeds=1", "seeds"),
        ("gammas=01", "gammas"),
        ("iterations=9.5", "iterations"),
    ],
)
def test_command_refuses(word, field, tmp_path):
    assert f"`{field}`" in here("toy_gamma", word, folder=tmp_path).sentence
