"""A frozen teacher's scores on disk, for rows that come again: fixed data, another seed, another method."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.loading import Loading, holding
from opd_lightning.protocols import Scoring
from opd_lightning.serving.wire import (
    VERSION,
    ScoreAnswer,
    ScoreRequest,
    Wanted,
    WireError,
    answer_of,
    scores_of,
)
from opd_lightning.types import PromptBatch, Scores, TokenBatch, Want


@dataclass(frozen=True, kw_only=True)
class CachedScorer:
    """Asks a teacher for the rows alone that no one has asked it for before.

    A row is known again by its content: the weights, the vocabulary, the temperature, every token, every given id
    and what is wanted. Rows of fixed data come again (``rollout=teacher_text``, ``rollout.gold=data``) where
    the given ids are fixed too: with a support that the student chooses from they are not. A student's own
    rollouts come once each, and only fill the disk. Several processes and runs may share a folder.

    Args:
        teacher: is asked for what is not there; frozen.
        model: names its weights.
        vocab: ids that both models know.
        temperature: scoring temperature.
        folder: one file for each row, 8 bytes for an id with its log-prob.
    """

    teacher: Scoring
    model: str
    vocab: int
    temperature: float
    folder: Path

    kind = "cached"
    """For people."""

    @property
    def view(self) -> Callable[[PromptBatch], PromptBatch] | None:
        """The teacher's own prompts, where it has some."""
        return getattr(self.teacher, "view", None)

    def to(self, device: torch.device | str) -> CachedScorer:
        """Move the teacher's weights, where they are in this process."""
        if hasattr(self.teacher, "to"):
            self.teacher.to(device)
        return self

    def holding(self) -> AbstractContextManager[None]:
        """Have the teacher's weights stay once they have come."""
        return holding(self.teacher)

    @torch.no_grad()
    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Score the tokens; those of rows that are on disk are read.

        Raises:
            ConfigError: hidden states are wanted, which are not kept.
        """
        if want.hidden or want.full:
            raise ConfigError(
                "`teacher.cache` must be null for a comparison of whole vocabularies, whose hidden states are not "
                f"kept, got {str(self.folder)!r}; leave it out, or use support=teacher"
            )
        given = support_ids if want.support != "none" else None
        wanted = Wanted.of(want, self.vocab, self.temperature)
        requests = [
            ScoreRequest.of(tokens.rows([row]), None if given is None else given[[row]], wanted)
            for row in range(len(tokens.ids))
        ]
        paths = [self._path(request) for request in requests]
        answers = [self._read(path, request) for path, request in zip(paths, requests, strict=True)]
        if missing := [row for row, answer in enumerate(answers) if answer is None]:
            part = tokens.rows(missing)
            exact = replace(want, support="none" if given is None else "exact")
            scores = self.teacher(part, exact, None if given is None else given[missing])
            for place, row in enumerate(missing):
                answer = answer_of(scores.rows([place]), part.mask[[place]], self.model)
                _write(paths[row], answer.write())
                answers[row] = answer
        return scores_of([answer for answer in answers if answer is not None], tokens.mask, want)

    def _path(self, request: ScoreRequest) -> Path:
        # Not of the payload: safetensors writes its header's words in any order.
        hashed = hashlib.sha256(f"{VERSION} {self.model} {request.wanted}".encode())
        for tensor in (request.ids, request.prompts, request.responses, request.given):
            hashed.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        name = hashed.hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.safetensors"

    def _read(self, path: Path, request: ScoreRequest) -> ScoreAnswer | None:
        """Return what is on disk; a file that is broken is as none."""
        try:
            return ScoreAnswer.read(path.read_bytes(), request)
        except (OSError, WireError):
            return None


def cached(teacher: Scoring, folder: str | None, model: str, loading: Loading) -> Scoring:
    """Return a teacher with a cache in ``folder``, itself for None.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if folder is None:
        return teacher
    path = Path(folder).expanduser()
    writable = False
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    require(writable, "teacher.cache", "be a folder that can be written", folder, "use another, or null")
    return CachedScorer(
        teacher=teacher, model=model, vocab=loading.vocab, temperature=loading.temperature, folder=path
    )


def _write(path: Path, body: bytes) -> None:
    """Write a file that is whole or not there, whoever else writes it."""
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(body)
    os.replace(file.name, path)
