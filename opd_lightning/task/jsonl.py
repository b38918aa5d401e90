"""The user's own problems, from jsonl or parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_lightning.errors import ConfigError, require
from opd_lightning.task.grading import grade_answer
from opd_lightning.types import Problem

_LINES = (".jsonl", ".ndjson", ".json", ".txt", "")
"""Endings of files that are read line by line."""
_KNOWN = ("prompt", "messages", "answer", "response", "difficulty")


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """Problems from files, a row each: ``prompt`` (text) or ``messages`` (chat), and what may follow.

    ``answer`` makes accuracy measurable: it is compared with the last boxed answer of a response.
    ``response`` is a gold response, ``difficulty`` a label that evaluation groups by.

    Args:
        path: training problems, ``.jsonl`` or ``.parquet``; None where only held-out ones are asked for.
        val_path, test_path: held-out problems; None for none.

    Raises:
        ConfigError: no file to train on, one that is missing or empty, or a
            row that cannot be read, with its line number.
    """

    path: str | None = None
    val_path: str | None = None
    test_path: str | None = None

    def __post_init__(self) -> None:
        for split, name in self._files().items():
            if name is not None:
                require(Path(name).expanduser().is_file(), _field(split), "be a file", name, "check the path")

    def _files(self) -> dict[str, str | None]:
        return {"train": self.path, "validation": self.val_path, "test": self.test_path}

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of a split; none where it has no file."""
        files = self._files()
        require(split in files, "split", f"be one of {', '.join(files)}", split, "use validation")
        name = files[split]
        if name is None and split == "train":
            raise ConfigError("`task.path` must be given, got nothing; add task.path=train.jsonl")
        if name is None:
            return []
        field, rows = _field(split), _rows(Path(name).expanduser(), _field(split))
        problems = [_problem(i, row, f"{name}:{line}", field) for i, (line, row) in enumerate(rows)]
        require(
            len(problems) > 0,
            field,
            "hold at least one problem",
            name,
            "the file is empty; write a row a line",
        )
        return problems

    def grade(self, problem: Problem, response: str) -> float | None:
        """Return 1.0 or 0.0 by the boxed answer, None for a problem without an answer."""
        return None if problem.answer is None else grade_answer(response, problem.answer)


def _field(split: str) -> str:
    return {"train": "task.path", "validation": "task.val_path", "test": "task.test_path"}[split]


def _rows(path: Path, field: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield each row with its line number, from 1."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path, field), 1)
        return
    remedy = "write .jsonl, one JSON object a line, or .parquet"
    require(path.suffix in _LINES, field, "end in .jsonl or .parquet", str(path), remedy)
    try:
        yield from _decoded(path, field)
    except OSError as error:
        raise ConfigError(
            f"`{field}` must be a file that can be read, got {str(path)!r} ({error.strerror}); check its permissions"
        ) from error


def _decoded(path: Path, field: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # Lines are decoded one by one, so that a broken one can be named; the first may carry a byte-order mark.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                raise ConfigError(
                    f"`{field}` must hold one JSON object a line, got a broken one at {path}:{number} ({error}); "
                    "correct or remove that line"
                ) from error
            yield number, row


def _parquet(path: Path, field: str) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            f"`{field}` must be readable, got {str(path)!r}, and parquet needs pyarrow; "
            "pip install 'opd-lightning[parquet]', or write jsonl"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ConfigError(
            f"`{field}` must be a parquet file, got {str(path)!r} ({str(error).splitlines()[0]}); check the file"
        ) from error
    return rows


def _problem(index: int, row: Any, place: str, field: str) -> Problem:
    if not isinstance(row, Mapping) or not (row.get("prompt") or row.get("messages")):
        raise ConfigError(
            f"`{field}` must give each row a `prompt` or `messages`, got neither at {place}; "
            'write {"prompt": "...", "answer": "..."}'
        )
    return Problem(
        index=index,
        messages=_messages(row, place, field),
        answer=_text(row.get("answer")),
        response=_text(row.get("response")),
        difficulty=_text(row.get("difficulty")),
        extra={name: value for name, value in row.items() if name not in _KNOWN},
    )


def _messages(row: Mapping[str, Any], place: str, field: str) -> tuple[dict[str, str], ...]:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return ({"role": "user", "content": prompt},)
    # Some data sets keep the chat under `prompt`.
    messages = prompt or row["messages"]
    fits = isinstance(messages, list) and all(
        isinstance(m, Mapping) and {"role", "content"} <= m.keys() and isinstance(m["content"], str)
        for m in messages
    )
    if not fits:
        raise ConfigError(
            f"`{field}` must give `prompt` as text or chat messages as a list of objects with role and content, "
            f"got {messages!r:.80} "
            f'at {place}; write [{{"role": "user", "content": "..."}}]'
        )
    if messages[-1]["role"] == "assistant":
        raise ConfigError(
            f"`{field}` must give `messages` that end before the answer, got an assistant's turn last at {place}; "
            "move its content to `response`, or the prompt would hold the solution"
        )
    return tuple({"role": str(m["role"]), "content": str(m["content"])} for m in messages)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
