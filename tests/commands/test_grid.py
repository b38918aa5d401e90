"""A grid: one folder a job named by its overrides, and a support that an estimator does not read changes nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from commands.running import end, here, losses, start

GRID = {"estimator": ["token", "discounted", "sequence", "topk"], "support": ["teacher", "student"]}
WORDS = ["-m", *(f"{group}={','.join(options)}" for group, options in GRID.items()), "debug=fast"]
CLASSES = {"token": "Token", "discounted": "Discounted", "sequence": "Sequence", "topk": "TopK"}
CLASSES |= {"teacher": "TeacherTopK", "student": "StudentTopK"}
NOTICE = "the support only feeds the diagnostics"


def runs(folder: Path) -> dict[str, Path]:
    """Return the finished runs below ``folder`` by their folders' names."""
    return {path.parent.name: path.parent for path in folder.glob("multirun/*/*/*/summary.json")}


def settings(run: Path) -> dict[str, str | float]:
    """Return the hyper-parameters that TensorBoard shows of a run."""
    contents = EventAccumulator(str(run)).Reload().PluginTagToContent("hparams")
    sessions = [HParamsPluginData.FromString(content).session_start_info for content in contents.values()]
    found = {}
    for name, value in (item for session in sessions for item in session.hparams.items()):
        found[name] = value.string_value or value.number_value
    return found


def name(estimator: str, support: str) -> str:
    return f"debug=fast,estimator={estimator},support={support}"


def test_an_estimator_that_does_not_read_the_support(tmp_path, monkeypatch):
    """The losses of the pair are the same, digit for digit, and each run says why."""
    monkeypatch.chdir(tmp_path)
    small = ["evaluation.settings.problems=1", "evaluation.teacher=false"]
    words = ["-m", "estimator=discounted", "support=teacher,student", "debug=fast", *small]
    done = here("train", *words, folder=tmp_path)
    assert done.code == 0, done.err
    assert done.out.count(NOTICE) == 2
    one, other = (losses(run) for run in runs(tmp_path).values())
    assert len(one) == 2
    assert one == other


@pytest.mark.slow
def test_a_grid_of_estimators_and_supports(tmp_path):
    done = end(start("train", *WORDS, cwd=tmp_path), tmp_path)
    assert done.code == 0, done.err
    assert "Traceback" not in done.out + done.err
    found = runs(tmp_path)
    pairs = list(itertools.product(*GRID.values()))
    assert found.keys() == {name(*pair) for pair in pairs}
    assert done.out.count(NOTICE) == 6

    by_pair = {pair: losses(found[name(*pair)]) for pair in pairs}
    assert all(len(values) == 2 for values in by_pair.values())
    for estimator in GRID["estimator"]:
        one, other = (by_pair[estimator, support] for support in GRID["support"])
        assert (one == other) == (estimator != "topk")
    assert len({tuple(values) for values in by_pair.values()}) == 5

    for estimator, support in pairs:
        shown = settings(found[name(estimator, support)])
        assert shown["estimator"] == CLASSES[estimator]
        assert shown["support"] == CLASSES[support]
        assert shown["support/k"] == 16
        assert f"estimator={estimator}" in shown["Overrides"]
