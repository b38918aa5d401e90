"""Fixtures of the parts' tests."""

import pytest
from tabular import World


@pytest.fixture(params=[(3, 4), (4, 3), (5, 2)], ids=["V=3 n<=4", "V=4 n<=3", "V=5 n<=2"])
def world(request) -> World:
    return World(*request.param)
