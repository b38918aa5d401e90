"""Fixtures of the commands' tests."""

import pytest

from commands.own import SUMS, write_rows


@pytest.fixture
def sums(tmp_path):
    """A file of problems with answers."""
    return write_rows(tmp_path / "sums.jsonl", SUMS)


@pytest.fixture
def models_stay_closed(monkeypatch):
    """Fail where weights are read."""

    def read(*arguments, **more):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
