"""The notebooks run, show what they claim, and keep what they showed when they were run as they stand."""

from __future__ import annotations

import ast
import math
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from package.readme import ROOT, python_program

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICKSTART, GAMMA = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("quickstart", "gamma_variance"))


def code_cells(path: Path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def printed(cells) -> str:
    return "".join(o.text for cell in cells for o in cell.outputs if o.output_type == "stream")


def shown(cells, kind: str) -> list[str]:
    return [o.data[kind] for cell in cells for o in cell.outputs if kind in o.get("data", {})]


def accuracies(text: str) -> tuple[float, float]:
    (found,) = re.findall(r"greedy accuracy ([\d.]+)% -> ([\d.]+)%", text)
    return float(found[0]), float(found[1])


def test_every_notebook_has_a_test():
    assert {QUICKSTART, GAMMA} == set(NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_outputs_are_kept(path):
    """Every cell was run, in order, in one go, without a word on stderr."""
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [o for cell in cells for o in cell.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 500_000


def test_quickstart_shows_that_the_student_learned():
    """The stored outputs: from about a third to most problems, curves, and one problem wrong and then right."""
    cells = code_cells(QUICKSTART)
    before, after = accuracies(printed(cells))
    assert 25 < before < 45
    assert after >= 70
    (figure,) = shown(cells, "image/png")
    assert len(figure) > 10_000
    first, last = shown(cells, "text/markdown")
    assert "_wrong, " in first
    assert first.split("```")[0] == last.split("```")[0]


def test_quickstart_builds_what_the_readme_builds():
    """Line for line the same call of `assemble`."""

    def call(program: str) -> str:
        (found,) = [
            n for n in ast.walk(ast.parse(program)) if isinstance(n, ast.Assign) and n.targets[0].id == "run"
        ]
        return ast.dump(found)

    source = [cell.source for cell in code_cells(QUICKSTART)]
    (cell,) = [s for s in source if "run = assemble(" in s]
    assert call(cell) == call(python_program())


def test_gamma_variance_shows_what_the_text_says():
    """The stored outputs: variances in order, at least 5 times larger at the end, and drift under sure teachers."""
    cells = code_cells(GAMMA)
    plain, sure = (text.split("paper:") for text in printed(cells).split("left: late median variance")[1:])
    ratios = re.findall(r"last over first ([\d.]+), rises with every gamma: True", plain[0])
    assert len(ratios) == 2
    assert min(map(float, ratios)) >= 5
    assert "gamma 1 ends at its target in 2 of 2 cases" in plain[-1]
    assert "gamma 0 ends at its target in 2 of 2 cases" in sure[-2]
    assert "gamma 1 ends at its target in 0 of 2 cases" in sure[-1]
    assert len(shown(cells, "image/png")) == 3


def executed(path, folder, monkeypatch):
    """Run a notebook over a few steps, from top to bottom, in ``folder``; return its code cells."""
    monkeypatch.setenv("OPD_NOTEBOOK_STEPS", "16")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for a busy core spin
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
def test_quickstart_runs(tmp_path, monkeypatch):
    """A few optimizer steps: finite curves, and already a better student."""
    cells = executed(QUICKSTART, tmp_path, monkeypatch)
    before, after = accuracies(printed(cells))
    assert 0 < before < after <= 100
    (losses,) = re.findall(r"^loss ([\w.]+) -> ([\w.]+)$", printed(cells), re.MULTILINE)
    assert all(math.isfinite(float(loss)) for loss in losses)
    assert float(losses[1]) < float(losses[0])
    assert len(shown(cells, "image/png")) == 1
    assert "".join(os.listdir(tmp_path)) == "runs"


@pytest.mark.slow
def test_gamma_variance_runs(tmp_path, monkeypatch):
    """A few updates: both experiments have their numbers, their claims and their pictures."""
    cells = executed(GAMMA, tmp_path, monkeypatch)
    assert len(re.findall(r"last over first [\d.e+]+, rises", printed(cells))) == 4
    assert printed(cells).count("\nmeasured: ") == 10
    assert len(shown(cells, "image/png")) == 3
    assert not os.listdir(tmp_path)
