"""The grader, as a table of what must and must not count as right."""

import pytest

from opd_lightning.task import grading
from opd_lightning.task.grading import after_thought, grade_answer, last_boxed, normalise

RIGHT = [
    ("The answer is \\boxed{7}.", "7"),
    ("<think>\nSells 12: 17-12=5.\n</think>\nThe answer is \\boxed{7}.", "7"),
    ("\\boxed{1} and so \\boxed{7}", "7"),  # the last one counts
    ("<think>\\boxed{1}</think> \\boxed{7}", "7"),
    ("<think>a</think>\\boxed{1}<think>b</think>\\boxed{7}", "7"),  # after the last thought
    ("\\boxed{-3}", "-3"),
    ("\\boxed{007}", "7"),
    ("\\boxed{ +7 }", "7"),
    ("\\boxed{$1,234$}", "1234"),
    ("\\boxed{1\\,234}", "1,234"),
    ("\\boxed {7}", "7"),
    ("\\boxed{7} \\boxed{", "7"),  # an unclosed box is no answer
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\dfrac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{x^{2} + 1}", "$x^{2}+1$"),
    ("\\boxed{\\left(1, 2\\right)}", "(1,2)"),
    ("\\boxed{B}", "B"),
    ("\\boxed{7}", "\\boxed{7}"),  # a gold answer that is boxed itself
]
WRONG = [
    ("\\boxed{8}", "7"),
    ("7", "7"),  # not boxed
    ("", "7"),
    ("\\boxed{}", "7"),
    ("\\boxed{7} then \\boxed{8}", "7"),
    ("<think>\\boxed{7}</think> I do not know", "7"),  # a guess inside the thought
    ("<think> so \\boxed{7}", "7"),  # a thought that never ended
    ("<think>a</think>\\boxed{7}<think>b</think>\\boxed{8}", "7"),
    ("\\boxed{77}", "7"),
    ("\\boxed{-7}", "7"),
    ("\\boxed{7", "7"),
    ("\\boxed{10+1}", "101"),
    ("\\boxed{1,23}", "123"),  # not a thousands' comma
    ("\\boxed{A}", "B"),
]
MATHEMATICS = [
    ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
    ("\\boxed{\\frac{2}{4}}", "\\frac12", 1.0),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
    ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1.0),
    ("\\boxed{\\frac{1}{3}}", "\\frac{1}{2}", 0.0),
    ("\\boxed{9^{9^{9^{9}}}}", "\\frac{1}{2}", 0.0),  # must return at all
    ("\\boxed{99999!!}", "\\frac{1}{2}", 0.0),
]


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right(response, answer):
    assert grade_answer(response, answer) == 1.0


@pytest.mark.parametrize(("response", "answer"), WRONG)
def test_wrong(response, answer):
    assert grade_answer(response, answer) == 0.0


@pytest.mark.parametrize(("response", "answer"), RIGHT)
def test_right_without_the_optional_package(response, answer, monkeypatch):
    monkeypatch.setattr(grading, "_math_verify", lambda: None)
    assert grade_answer(response, answer) == 1.0


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("response", "answer", "grade"), MATHEMATICS)
def test_mathematics(response, answer, grade):
    pytest.importorskip("math_verify")
    assert grade_answer(response, answer) == grade


def test_pieces():
    assert after_thought("a</think>b</think>c") == "c"
    assert after_thought("plain") == "plain"
    assert after_thought("<think>open") == ""
    assert last_boxed("\\boxed{a{b}c}d}") == "a{b}c"
    assert last_boxed("\\boxed x") is None
    assert normalise(" $1,234$. ") == "1234"
    assert normalise("1,234,567") == "1234567"
