"""Statistics of written text: how much of it repeats itself."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

REPEATED_NGRAM = 8
"""Tokens in a row that count as a repetition when they occur again."""


def repeated_share(ids: Sequence[int], n: int = REPEATED_NGRAM) -> float:
    """Return the share of the n-grams of ``ids`` that occurred before in it; 0 for fewer than n tokens.

    1 - (different n-grams) / (n-grams): about 0 for healthy text, close to 1 for a loop.
    """
    count = len(ids) - n + 1
    if count <= 0:
        return 0.0
    return 1.0 - len({tuple(ids[i : i + n]) for i in range(count)}) / count


def repetitive(text: str, window: int = 10_000, ratio: float = 10.0) -> bool:
    """Return whether the last ``window`` characters compress by more than ``ratio`` (StableOPD's rep(y)).

    rep(y) = 1 iff bytes(tail) / bytes(zlib(tail)) > kappa and len(text) >= L, with L = 10,000 and kappa = 10
    (arXiv 2604.08527; zlib's level, not published, is its default). A shorter text is never repetitive.
    """
    if len(text) < window:
        return False
    tail = text[-window:].encode()
    return len(tail) / len(zlib.compress(tail)) > ratio
