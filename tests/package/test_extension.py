"""The README's estimator in two files outside of the package: it trains, and its loss is its formula."""

from __future__ import annotations

import csv
import importlib
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from parts.tabular import World

from opd_lightning.building import run_from
from opd_lightning.collector import World as Processes
from opd_lightning.paths import CONF_DIR
from package.readme import ROOT, Command, blocks, commands, write_files


@pytest.fixture
def squared(tmp_path, monkeypatch):
    """The README's class, imported from a folder of its own."""
    monkeypatch.syspath_prepend(write_files(tmp_path))
    yield importlib.import_module("my_parts.squared").SquaredLogRatio
    for name in ("my_parts.squared", "my_parts"):
        sys.modules.pop(name, None)


def the_command() -> Command:
    """The README's command that names the two files."""
    (found,) = [c for c in commands("run") if "--config-dir" in c.words]
    return found


def train_rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def test_two_files_and_none_of_the_package():
    files = [b.file for b in blocks() if b.file and b.language in ("python", "yaml")]
    assert files == ["my_parts/squared.py", "my_conf/estimator/squared.yaml"]
    assert not any((ROOT / file).exists() for file in files)
    assert "squared" not in {p.stem for p in (CONF_DIR / "estimator").iterdir()}


def log_ratios(run, rollout):
    """log T - log S of each response token by a plain forward of transformers, a response at a time."""
    found = []
    for row in range(len(rollout.ids)):
        prompt = rollout.prompt.ids[row][rollout.prompt.mask[row]]
        response = rollout.ids[row][rollout.mask[row]]
        tokens = torch.cat([prompt, response]).unsqueeze(0)
        taken = [
            scorer.model(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for scorer in (run.teacher.scorer, run.module.student)
        ]
        teacher, student = (logp.gather(-1, response.unsqueeze(-1)).squeeze(-1) for logp in taken)
        found.append(teacher - student)
    return torch.cat(found)


def test_its_loss_is_its_formula(finished):
    """The first step's loss is the mean over its tokens of (log S - log T)^2 / 2."""
    done = finished(the_command())
    assert done.code == 0, done.err
    first, second = train_rows(done.run)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        run = run_from(compose("train", ["estimator=token", "support=none", "debug=fast"]))
    run.module.student.eval()
    with torch.no_grad():
        steps, _ = run.data.collector.collect(run.module.student, 0, 0.0, 0, Processes())
        experience, _ = steps
        ratios = log_ratios(run, experience.rollout)
    assert float(first["train/tokens"]) == len(ratios)
    assert float(first["train/log_ratio"]) == pytest.approx(float(ratios.mean()), abs=1e-5)
    assert float(first["train/loss"]) == pytest.approx(float(0.5 * (ratios**2).mean()), rel=1e-5)
    assert float(first["train/grad_norm"]) > 0
    assert second["train/loss"] != first["train/loss"]


def test_its_setting_is_on_the_command_line(finished):
    """A coefficient of 2 doubles the first step's loss."""
    given = the_command()
    doubled = Command(f"{given.text} estimator.scale=2", given.variables, (*given.words, "estimator.scale=2"))
    losses = [float(train_rows(finished(c).run)[0]["train/loss"]) for c in (given, doubled)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


@pytest.mark.parametrize("size", [(3, 4), (5, 2)])
def test_its_expected_gradient_is_that_of_reverse_kl(squared, size):
    """Over every response: the gradient of KL(S || T) at each prefix, prefixes fixed, as the README says."""
    world = World(*size)
    got = world.expected_gradient(squared(scale=1.0)(world.scores, world.experience, 0.0))
    student, teacher = world.student_logp, world.teacher_logp
    visits = torch.tensor([world.visits[prefix] for prefix in world.prefixes], dtype=torch.float64)
    exact = world.gradient((visits * (student.exp() * (student - teacher)).sum(-1)).sum())
    torch.testing.assert_close(got, exact, atol=1e-9, rtol=0)
    assert exact.abs().max() > 1e-2
