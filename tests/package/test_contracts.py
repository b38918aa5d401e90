"""The tree keeps its own rules: layers, lint, types, docstrings, configuration targets, no machine's paths."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from package.readme import ROOT

PACKAGE = ROOT / "opd_lightning"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = {c["name"]: c for c in PROJECT["tool"]["importlinter"]["contracts"]}
BIN = Path(sys.executable).parent

# Modules that may know Hydra: the commands, and what they share.
COMMANDS = {"train", "evaluate", "make_task", "toy_gamma", "choose_horizon", "serve_teacher"}
COMMANDS |= {"reporting", "building", "commands", "overrides", "plan", "preflight"}
# Modules that may know Lightning: the two halves and what runs them.
RUNNERS = {"processes", "module", "data", "assemble", "export", "callbacks", "optim", "strategies"}
RUNNERS |= {"loggers", "resume", "launching"}


def modules() -> set[str]:
    """First level of the package: modules, and folders with modules in them."""
    files = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    return files | {p.parent.name for p in PACKAGE.glob("*/*.py")}


# -- the tools


@pytest.mark.parametrize(
    "words",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--no-cache", "--check", "."],
        ["mypy"],
        ["lint-imports"],
    ],
    ids=["ruff-check", "ruff-format", "mypy", "import-contracts"],
)
def test_lint(words):
    """What `make lint` runs, tool by tool."""
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_lint_runs_all_of_them():
    rule = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert set(re.findall(r"\$\(BIN\)/([\w-]+)", rule)) == {"ruff", "mypy", "lint-imports"}


# -- the contracts themselves leave nothing out


def test_hydra_contract_covers_every_module():
    contract = CONTRACTS["Hydra is known to the commands alone"]
    assert {m.split(".")[1] for m in contract["source_modules"]} == modules() - COMMANDS
    assert {"hydra", "omegaconf"} <= set(contract["forbidden_modules"])


def test_lightning_contract_covers_every_module():
    contract = CONTRACTS["Lightning is known to the two halves and what runs them alone"]
    assert {m.split(".")[1] for m in contract["source_modules"]} == modules() - COMMANDS - RUNNERS
    assert {"lightning", "pytorch_lightning"} <= set(contract["forbidden_modules"])


def test_parts_are_one_layer_of_siblings():
    """Siblings of a layer are independent; every group of the configuration that has parts is one of them."""
    contract = CONTRACTS["Layers, and every module in one"]
    assert contract["exhaustive"]
    (parts,) = [set(layer.split(" | ")) for layer in contract["layers"] if "estimator" in layer]
    groups = {p.name for p in (ROOT / "conf").iterdir() if p.is_dir()}
    assert groups & modules() - {"callbacks", "collector", "evaluation", "planning"} <= parts
    assert {
        m.split(".")[1] for m in CONTRACTS["The parts do not know the two halves"]["source_modules"]
    } == parts


# -- configuration


def targets(node) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for value in node.values() for t in targets(value)]
    return [t for value in node for t in targets(value)] if isinstance(node, list) else []


YAMLS = sorted((ROOT / "conf").rglob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT / "conf")))
def test_targets_exist(path):
    for target in targets(yaml.safe_load(path.read_text()) or {}):
        module, _, name = target.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name, None)), target


def test_targets_are_found():
    assert sum(len(targets(yaml.safe_load(p.read_text()) or {})) for p in YAMLS) > 30


# -- files


def tree() -> list[Path]:
    """Every file that git has or would take, and in a tree without git every file but for caches."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    hidden = (".venv", ".git/", "_cache", "__pycache__")
    files = (p for p in ROOT.rglob("*") if p.is_file())
    return [p for p in files if not any(h in str(p.relative_to(ROOT)) for h in hidden)]


# Spelled so that this file does not hold them.
MACHINE = re.compile(r"(?<![\w.$}])/(?:work|root|farm|home/\w+)/")
REGISTRY = re.compile(
    r"--(?:extra-)?index-" + r"url|PIP_[A-Z_]*INDEX|find-" + r"links|pythonhosted|\bpypi\.|\bhf-mirror",
    re.IGNORECASE,
)


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["paths", "registries"])
def test_no_machine_is_named(pattern):
    found = []
    for path in tree():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if path != Path(__file__):
            found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in pattern.finditer(text)]
    assert not found


@pytest.mark.parametrize(
    ("pattern", "text", "holds"),
    [
        (MACHINE, "cd /" + "work/main", True),
        (MACHINE, "'/" + "root/.cache/x'", True),
        (MACHINE, "frame/" + "work/size", False),
        (REGISTRY, "pip install --index-url x", True),
        (REGISTRY, "https://files.pythonhosted.org", True),
        (REGISTRY, "an index of urls", False),
    ],
)
def test_patterns(pattern, text, holds):
    assert bool(pattern.search(text)) == holds


def test_no_notes_in_the_package():
    """Text files of the package are about checkpoints; anything else is a note that somebody forgot."""
    notes = [p.relative_to(PACKAGE) for p in tree() if p.suffix in (".md", ".txt") and PACKAGE in p.parents]
    assert not [str(p) for p in notes if p.parts[0] != "checkpoints"]


# -- docstrings


def undocumented(body, prefix="") -> list[str]:
    missing = []
    for node in body:
        if not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) or node.name.startswith("_"):
            continue
        overload = any("overload" in ast.dump(d) for d in node.decorator_list)
        if not overload and not ast.get_docstring(node):
            missing.append(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            missing += undocumented(node.body, f"{prefix}{node.name}.")
    return missing


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_docstrings(path):
    """Every module and every public class, method and function says what it is."""
    module = ast.parse(path.read_text())
    assert ast.get_docstring(module) or not module.body
    assert undocumented(module.body) == []
