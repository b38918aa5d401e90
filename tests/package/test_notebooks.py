"""The notebook runs, learns, and keeps what it showed when it was run as it stands."""

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
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"


def code_cells(path: Path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def printed(cells) -> str:
    return "".join(o.text for cell in cells for o in cell.outputs if o.output_type == "stream")


def shown(cells, kind: str) -> list[str]:
    return [o.data[kind] for cell in cells for o in cell.outputs if kind in o.get("data", {})]


def accuracies(text: str) -> tuple[float, float]:
    (found,) = re.findall(r"greedy accuracy ([\d.]+)% -> ([\d.]+)%", text)
    return float(found[0]), float(found[1])


def test_there_are_notebooks():
    assert QUICKSTART in NOTEBOOKS


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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_runs(path, tmp_path, monkeypatch):
    """A few optimizer steps from top to bottom: finite curves, and already a better student."""
    monkeypatch.setenv("OPD_NOTEBOOK_STEPS", "16")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for a busy core spin
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    )
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    before, after = accuracies(printed(cells))
    assert 0 < before < after <= 100
    (losses,) = re.findall(r"^loss ([\w.]+) -> ([\w.]+)$", printed(cells), re.MULTILINE)
    assert all(math.isfinite(float(loss)) for loss in losses)
    assert float(losses[1]) < float(losses[0])
    assert len(shown(cells, "image/png")) == 1
    assert "".join(os.listdir(tmp_path)) == "runs"
