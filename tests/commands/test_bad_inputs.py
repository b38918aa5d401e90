"""Every input of the table in docs/bad_inputs.md is run, and gets the sentence that the page says."""

from __future__ import annotations

import re

import pytest

from commands.bad_inputs import INPUTS, PAGE, Bad, last_line, missing, row, said

# Those of these groups are refused in many more ways in test_refusals.py, in the default suite.
_LONG = ("Files", "Settings")
CASES = [
    pytest.param(bad, id=bad.what, marks=[pytest.mark.slow] if group in _LONG else [])
    for group, inputs in INPUTS.items()
    for bad in inputs
]
ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "| input |" not in line]


def cell(line: str, place: int) -> str:
    return re.split(r"(?<!\\) \| ", line.strip("| "))[place].replace("\\*", "").strip()


@pytest.mark.parametrize("bad", CASES)
def test_it_gets_its_sentence(bad: Bad, tmp_path):
    if why := missing(bad.needs):
        pytest.skip(why)
    sentence = last_line(said(bad, tmp_path))
    assert ", got " in sentence
    assert "; " in sentence
    assert row(bad, sentence) in ROWS


def test_the_page_has_each_input_once():
    names = [bad.what for inputs in INPUTS.values() for bad in inputs]
    assert len(names) == len(set(names)) >= 40
    assert [cell(line, 0) for line in ROWS] == names
