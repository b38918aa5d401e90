"""The README holds: every command runs, every option and metric that it names exists, and the other way round."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from opd_lightning.assemble import CollectorSettings
from opd_lightning.building import KEYS, objective_from
from opd_lightning.commands import build, plain, refuse_unknown_keys
from opd_lightning.errors import ConfigError
from opd_lightning.paths import CONF_DIR
from package.readme import (
    ROOT,
    TEXT,
    blocks,
    commands,
    links,
    python_program,
    run_program,
    substituted,
    write_files,
)


def ids(command):
    return command.text.split("#")[0].strip()


# -- the blocks themselves


def test_every_block_has_a_known_class():
    kinds = {(b.language, b.kind) for b in blocks()}
    assert {("bash", k) for k in ("setup", "run", "fails", "grid", "gpu", "hub")} <= kinds
    assert ("python", "run") in kinds
    assert TEXT.count("\n```") + TEXT.startswith("```") == 2 * len(blocks())


@pytest.mark.parametrize("info", ["bash rnu", "python", "bash run gpu", "json"])
def test_a_block_without_a_known_class_is_refused(info):
    with pytest.raises(AssertionError, match="README line 2"):
        blocks(f"text\n```{info}\nls\n```\n")


@pytest.mark.parametrize("block", [b for b in blocks() if b.kind is None and b.language == "bash"])
def test_what_is_not_run_is_not_ours(block):
    assert block.text.split()[0] == "tensorboard"


# -- setup: too slow here, run by .ci/run


@pytest.mark.parametrize("command", commands("setup"), ids=ids)
def test_setup_commands_are_targets_and_run_by_ci(command):
    name, target = command.words
    assert name == "make"
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.search(rf"^{command.text}( |$)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_make_targets_have_rules():
    """Every target that a target or .PHONY names has a rule of its own."""
    makefile = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) == rules


# -- run, fails, grid


@pytest.mark.parametrize("command", commands("run"), ids=ids)
def test_run(command, finished):
    done = finished(command)
    assert done.code == 0, done.err
    assert "Traceback" not in done.out + done.err
    if command.module == "opd_lightning.train":
        left = {path.name for path in done.run.iterdir()}
        profiled = "debug=profile" in command.arguments
        written = {"profile.md", "trace.json.gz"} if profiled else {"student", "checkpoints"}
        assert {"summary.json", "metrics.csv", "config.yaml"} | written <= left
        assert any(name.startswith("events.out.tfevents") for name in left)
        summary = json.loads((done.run / "summary.json").read_text())
        assert profiled or summary["optimizer_steps"] == 2
        assert 0 <= summary["accuracy_before"] <= 1
        assert 0 <= summary["accuracy_after"] <= 1
    elif command.module == "opd_lightning.choose_horizon":
        (found,) = done.folder.glob("runs/**/horizon.json")
        (said,) = re.findall(r"`N = (\d+)`", TEXT)
        assert (
            abs(json.loads(found.read_text())["horizon"] - int(said)) <= 8
        )  # rounding differs among machines
    elif command.module in ("opd_lightning.plan", "opd_lightning.preflight"):
        assert len(done.out.splitlines()) > 10
        assert not list(done.folder.glob("runs/*/*"))
    else:
        (found,) = done.folder.glob("runs/**/evaluation.json")
        assert 0 <= json.loads(found.read_text())["metrics"]["all"]["accuracy"] <= 1


@pytest.mark.parametrize("command", commands("fails"), ids=ids)
def test_fails(command, finished):
    done = finished(command)
    assert done.code not in (0, None)
    sentence = done.err.strip()
    assert sentence.startswith("error: `")
    assert len(sentence.splitlines()) == 1
    assert "Traceback" not in done.out + done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in blocks() if b.kind in ("run", "fails") and b.language == "bash"]
)
def test_blocks_in_a_shell(block, tmp_path):
    """As a reader would: a shell, the environment's python, each block as it is written but for its length."""
    write_files(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    lines = []
    for line in block.text.splitlines():
        code = line.split(" #")[0].rstrip()
        shorten = "opd_lightning.train" in code and "debug=fast" not in code
        lines.append(f"{code} debug=fast" if shorten else code)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(lines)],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stdout + done.stderr
    if block.kind == "run":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("grid"), ids=ids)
def test_grid(command, finished):
    """Each job has a folder named by its overrides; an estimator without a support does not read one."""
    done = finished(command)
    assert done.code == 0, done.err
    assert "only feeds the diagnostics" in done.out
    losses = {}
    for summary in done.folder.glob("multirun/**/summary.json"):
        with (summary.parent / "metrics.csv").open() as file:
            losses[summary.parent.name] = [r["train/loss"] for r in csv.DictReader(file) if r["train/loss"]]
    names = {
        f"estimator={e},support={s}"
        for e in ("token", "discounted", "sequence", "topk")
        for s in ("teacher", "student")
    }
    assert {name.replace("debug=fast,", "") for name in losses} == names
    by_name = {name.replace("debug=fast,", ""): loss for name, loss in losses.items()}
    assert all(len(loss) == 2 for loss in by_name.values())
    for estimator in ("token", "discounted", "sequence"):
        pair = [by_name[f"estimator={estimator},support={s}"] for s in ("teacher", "student")]
        assert pair[0] == pair[1]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("every"), ids=ids)
def test_every_preset_in_one_command(command, finished):
    done = finished(command)
    assert done.code == 0, done.err
    summaries = list(done.folder.glob("multirun/**/summary.json"))
    assert len(summaries) == len(options("experiment"))
    assert all(json.loads(path.read_text())["optimizer_steps"] == 2 for path in summaries)
    for path in summaries:
        losses = [float(row["train/loss"]) for row in rows(path.parent) if row["train/loss"]]
        assert len(losses) == 2
        assert all(map(math.isfinite, losses))


# -- gpu, hub: composed and, but for the models, built


@pytest.mark.parametrize("command", commands("gpu") + commands("hub"), ids=ids)
def test_composes(command, tmp_path, monkeypatch):
    monkeypatch.chdir(write_files(tmp_path))
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("train", list(command.words[3:]))
    refuse_unknown_keys(config, KEYS)
    assert objective_from(config).needs.support
    CollectorSettings(**plain(config.collector))
    for part in ("rollout", "teacher", "task", "scheduler", "optimizer"):
        build(config[part])
    missing = "engine=vllm" in command.words and find_spec("vllm") is None
    with pytest.raises(ConfigError, match="pip install") if missing else contextlib.nullcontext():
        build(config.engine)
    build(config.evaluation.settings)
    assert config.trainer.accelerator == "gpu"


# -- Python


def test_python_program(tmp_path, monkeypatch):
    """As it is written but for three numbers; that it equals the command is test_python_api's."""
    monkeypatch.chdir(tmp_path)
    short = {
        r"Trainer\(max_steps=\d+": "Trainer(max_steps=2",
        r"prompts_per_collection=\d+": "prompts_per_collection=4",
        r"problems=\d+": "problems=4",
    }
    names = run_program(substituted(python_program(), short))
    assert names["trainer"].global_step == 2
    assert "eval/accuracy" in names["trainer"].callback_metrics


# -- what the README says exists


def options(group: str) -> set[str]:
    return {path.stem for path in (CONF_DIR / group).glob("*.yaml")}


def option_table() -> dict[tuple[str, ...], set[str]]:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", TEXT, re.MULTILINE)
    groups = {
        tuple(re.findall(r"`([\w.]+)`", left)): re.findall(r"`\[?([\w.]+)\]?`", right) for left, right in rows
    }
    return {group: set(named) for group, named in groups.items() if group}


def test_every_option_of_the_table_exists():
    assert len(option_table()) >= 10
    for groups, named in option_table().items():
        there = set().union(*(options(group) for group in groups))
        assert there, f"no such group: {groups}"
        assert named - {"path"} <= there, f"the README names options of {groups} that do not exist"


def test_every_option_is_in_the_table():
    """But for the models on a hub, which `path` stands for."""
    for groups, named in option_table().items():
        if "path" not in named:
            there = set().union(*(options(group) for group in groups))
            assert there <= named, f"the README leaves out options of {groups}"


def test_every_link_leads_somewhere():
    for target in links(TEXT):
        assert (ROOT / target).exists(), target


def test_the_house_is_as_drawn():
    """Files and folders of the README's map exist, and no part of the package is missing from it."""
    drawing = next(b.text for b in blocks() if "opd_lightning/\n" in b.text)
    inside = drawing.split("opd_lightning/\n", 1)[1]
    names = (re.split(r" {3,}", line.strip())[0] for line in inside.splitlines())
    named = {name for left in names for name in re.findall(r"\w+(?:\.py|/)", left)}
    package = ROOT / "opd_lightning"
    missing = [name for name in named if not (package / name).exists()]
    assert not missing
    folders = {
        f"{p.name}/"
        for p in package.iterdir()
        if p.is_dir() and list(p.glob("*.py")) and p.name != "callbacks"
    }
    assert folders - named <= {"diagnostics/"}, "a folder of parts is not on the map"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def logged(folder: Path) -> set[str]:
    return set(rows(folder)[0]) - {"epoch", "step"}


def test_every_metric_is_explained_and_logged(finished):
    """Over the README's own runs: the table names what is logged, and nothing is logged that it does not name."""
    table = TEXT.split("## What TensorBoard shows")[1].split("\n## ")[0]
    rows = [row for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    texts = {"rollout/samples"}
    runs = [c for c in commands("run") if c.module == "opd_lightning.train" and not c.variables]
    seen = set().union(*(logged(finished(c).run) for c in runs))
    pattern = {name: re.escape(name).replace("<phase>", r"\w+") for name in named - texts}
    unlogged = [name for name, p in pattern.items() if not any(re.fullmatch(p, s) for s in seen)]
    assert not unlogged, "the README explains metrics that no run logs"
    unexplained = [s for s in sorted(seen) if not any(re.fullmatch(p, s) for p in pattern.values())]
    assert not unexplained, "runs log metrics that the README does not explain"
