"""Grading by the final boxed answer: exact for whole numbers, by value for other mathematics.

Pure functions of two texts. A truncated response is the caller's business: it is wrong whatever it says.
"""

from __future__ import annotations

import functools
import logging
import re
from decimal import Decimal

_BOX = "\\boxed"
_PLAIN = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NOISE = re.compile(r"\\(?:left|right|,|;|!|:|quad|displaystyle)(?![A-Za-z])|\\text\{\s*\}|[\s$]")
# What a computer algebra system could work on for ever: factorials, power towers, long exponents.
_RISKY = re.compile(r"!|factorial|\^[^+\-*/=,]*\^|\^\{?[+-]?\d{4,}|\*\*")
_LONGEST = 400  # characters of an answer that is worth parsing


def grade_answer(response: str, answer: str) -> float:
    r"""Return 1.0 where the last ``\boxed{...}`` after the thought equals ``answer``, 0.0 otherwise.

    Plain numbers are compared as numbers (5 equals 5.0). Other answers are compared as normalised text and then, where
    the optional package ``math-verify`` is installed, as mathematics.
    """
    given = last_boxed(after_thought(response))
    if given is None:
        return 0.0
    wanted = normalise(answer if (boxed := last_boxed(answer)) is None else boxed)
    given = normalise(given)
    if _PLAIN.fullmatch(wanted) and _PLAIN.fullmatch(given):
        return float(Decimal(wanted) == Decimal(given))
    return float(wanted == given or same_mathematics(wanted, given))


def after_thought(text: str) -> str:
    """Return what follows the last ``</think>``; nothing after a thought that was never closed."""
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after
    return "" if "<think>" in text else text


def last_boxed(text: str) -> str | None:
    r"""Return what the last closed ``\boxed{...}`` holds, inner braces included, None without one."""
    start = len(text)
    while (start := text.rfind(_BOX, 0, start)) >= 0:
        body = text[start + len(_BOX) :].lstrip()
        if body.startswith("{") and (end := _closing(body)) is not None:
            return body[1:end]
    return None


def _closing(text: str) -> int | None:
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return place
    return None


def normalise(text: str) -> str:
    r"""Return ``text`` without spacing, dollar signs, thousands' commas and a closing full stop.

    >>> normalise(" $1,234$. "), normalise(r"\dfrac{1}{2}")
    ('1234', '\\frac{1}{2}')
    """
    short = _NOISE.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _THOUSANDS.sub("", short).rstrip(".")


def same_mathematics(wanted: str, given: str) -> bool:
    """Return whether ``math-verify`` finds the two equal; False without it or where it must not look."""
    verify = _math_verify()
    if verify is None or any(len(t) > _LONGEST or _RISKY.search(t) for t in (wanted, given)):
        return False
    return bool(verify(wanted, given))


@functools.cache
def _math_verify():  # type: ignore[no-untyped-def]
    try:
        from math_verify import parse
        from math_verify import verify as compare
    except ImportError:
        return None
    # It warns at its first use that time limits are off, which is what is wanted here.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def verify(wanted: str, given: str) -> bool:
        # Its own time limits use signals, which only work in the main thread of a process.
        parsed = [parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (wanted, given)]
        return all(parsed) and compare(parsed[0], parsed[1], timeout_seconds=None)

    return verify
