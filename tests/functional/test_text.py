"""How much of a text repeats itself."""

import random

import pytest

from opd_lightning.functional.text import repeated_share, repetitive


def test_repeated_share_on_literal_sequences():
    assert repeated_share([1, 2, 3, 4], n=2) == 0.0
    assert repeated_share([1, 2, 1, 2, 1], n=2) == pytest.approx(0.5)  # 12 21 12 21: two different of four
    assert repeated_share([7] * 10, n=8) == pytest.approx(2 / 3)
    assert repeated_share([7] * 7, n=8) == 0.0
    assert repeated_share([], n=8) == 0.0


def test_repetitive_needs_length_and_compression():
    loop = "Buys 3: 10+3=13.\n" * 1000
    draw = random.Random(0)
    noise = "".join(chr(draw.randrange(33, 126)) for _ in range(12_000))
    assert repetitive(loop)
    assert not repetitive(loop[:9_999])  # shorter than the window
    assert repetitive(loop[:9_999], window=5_000)
    assert not repetitive(noise)
    assert repetitive(noise + loop)  # the tail alone is looked at
    assert not repetitive(loop + noise)
    assert not repetitive(loop, ratio=1e6)
