"""Every contract of numerics.md has a test: its 31 points (11.N) and the combinations that it refuses (10.N).

A label is ``numerics 11.N``, or several with commas between, in the comment directly above a test function, in
its docstring or behind its ``def``. The refused combinations are numbered in the order in which section 10 lists them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
POINTS = [f"11.{n}" for n in range(1, 32)] + [f"10.{n}" for n in range(1, 12)]
LABEL = re.compile(r"\bnumerics (1[01]\.\d+(?:, 1[01]\.\d+)*)")


def labelled(source: str) -> dict[str, set[str]]:
    """Return the labels of each test function."""
    lines, found = source.splitlines(), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min(node.lineno, *(d.lineno for d in node.decorator_list), node.lineno)
            above = lines[first - 2].strip()
            around = [above if above.startswith("#") else "", ast.get_docstring(node) or ""]
            around += [line.partition("#")[2] for line in lines[node.lineno - 1 : node.body[0].lineno - 1]]
            found[node.name] = {n for text in around for m in LABEL.findall(text) for n in m.split(", ")}
    return found


def test_labels_are_read_where_they_stand():
    source = '''
# numerics 11.1, 11.2
@mark
def test_above(): ...

def test_behind():  # numerics 11.3
    ...

def test_inside():
    """numerics 11.4: words."""

# numerics 11.5

def test_nowhere(): ...
'''
    expected = {"above": {"11.1", "11.2"}, "behind": {"11.3"}, "inside": {"11.4"}, "nowhere": set()}
    assert labelled(source) == {f"test_{name}": labels for name, labels in expected.items()}


@pytest.fixture(scope="module")
def proven() -> set[str]:
    sources = [path.read_text() for path in TESTS.rglob("test_*.py")]
    return {label for source in sources for labels in labelled(source).values() for label in labels}


@pytest.mark.parametrize("point", POINTS)
def test_every_point_has_a_test(point, proven):
    assert point in proven
