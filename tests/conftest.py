"""What holds for every test: no model hub, one thread."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from jaxtyping import TypeCheckError

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Under the run-time type checker, let it refuse a value of a wrong type before our own sentence does."""
    if config.getoption("jaxtyping_packages", None):
        pytest.raises = or_wrong_type(pytest.raises)


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error, what it was raised from, and so on; the checker's errors go round in circles."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def or_wrong_type(raises: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``pytest.raises`` for which a refused type is as good as a ConfigError."""

    @contextlib.contextmanager
    def either(expected: Any, match: str | None = None) -> Iterator[Any]:
        types = expected if isinstance(expected, tuple) else (expected,)
        if "ConfigError" not in {t.__name__ for t in types}:
            with raises(expected, match=match) as info:
                yield info
            return
        with raises((*types, TypeCheckError)) as info:
            yield info
        if match is not None and not any(isinstance(e, TypeCheckError) for e in causes(info.value)):
            assert re.search(match, str(info.value)), f"{match!r} is not in {str(info.value)!r}"

    return either
