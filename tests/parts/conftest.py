"""Fixtures of the parts' tests."""

import pytest
from tabular import World


@pytest.fixture(params=[(3, 4), (4, 3), (5, 2)], ids=["V3-n4", "V4-n3", "V5-n2"])
def world(request) -> World:
    return World(*request.param)
