"""Responses that are written one collection ahead of their training, by the weights as they are by then."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import torch
from transformers import PreTrainedModel

from opd_lightning.protocols import DrawsApart, Writer
from opd_lightning.types import Generation, PromptBatch, Rollout, Sampling

Told = Callable[[Writer, PromptBatch, Generation], None]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which collection is to be written, at what progress, by the weights after how many optimizer steps.

    Responses get ``share`` of their length.
    """

    collection: int
    progress: float
    version: int
    share: float = 1.0


@dataclass(frozen=True)
class Written:
    """A rollout, and what is still to be told of how it came about: who generated what behind which prompts."""

    rollout: Rollout
    untold: tuple[tuple[Writer, PromptBatch, Generation], ...] = ()


@dataclass
class Ahead:
    """Keeps the next collection's rollout, which may still be on its way. Mutable, one a collector.

    Which weights write it is settled when it is begun, so that nothing depends on how fast it is written.
    """

    _next: tuple[int, Future[Written]] | None = field(default=None, repr=False)
    _taken: tuple[int, Rollout] | None = field(default=None, repr=False)

    def write(self, collection: int, write: Callable[[Told], Rollout]) -> None:
        """Have ``write`` write this collection in a thread; it is given what it tells of its draws to."""
        future: Future[Written] = Future()
        self._next = collection, future
        # A daemon, so that a run that stops does not wait for text that nobody will read.
        Thread(target=_run, args=(future, write), name="ahead", daemon=True).start()

    def restore(self, collection: int, rollout: Rollout) -> None:
        """Keep a rollout that is written."""
        future: Future[Written] = Future()
        future.set_result(Written(rollout))
        self._next = collection, future

    @property
    def unfinished(self) -> bool:
        """Whether a rollout is being written at this moment."""
        return self._next is not None and not self._next[1].done()

    def wait(self, seconds: float | None = None) -> None:
        """Return when nothing is being written, or after ``seconds``; what went wrong is kept for :meth:`take`."""
        if self._next is not None:
            wait([self._next[1]], seconds)

    def take(self, collection: int) -> Written | None:
        """Hand out the rollout of this collection, waiting for it; None where another one or none was written.

        Raises:
            ConfigError: what the engine raised while it wrote.
        """
        self.wait()
        kept, self._next = self._next, None
        if kept is None or kept[0] != collection:
            return None
        written = kept[1].result()
        self._taken = collection, written.rollout
        return written

    def done(self) -> None:
        """Forget what was taken: it is experience by now."""
        self._taken = None

    def pending(self, seconds: float | None = None) -> tuple[int, Rollout] | None:
        """Return the next collection's number and rollout for a checkpoint, waiting for it, and keep it.

        The weights that wrote it are gone when training resumes: it has to be saved, and given to
        :meth:`restore`. What was taken and is not experience yet comes first. None where there is none, where
        writing it failed, or where it is not there after ``seconds`` (None: as many as it takes); a run that
        goes on then has it written by newer weights.
        """
        if self._taken is not None:
            return self._taken
        self.wait(seconds)
        if self._next is None or self.unfinished or self._next[1].exception() is not None:
            return None
        return self._next[0], self._next[1].result().rollout


@dataclass(frozen=True)
class Sent:
    """The engine ``apart`` as it draws with the weights that were sent to it last, whatever the student's are now."""

    apart: DrawsApart

    def generate(self, model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> Generation:
        """Draw one response for each row; see :class:`~opd_lightning.protocols.DrawsApart`."""
        return self.apart.draw(model, prompts, sampling)


def _run(future: Future[Written], write: Callable[[Told], Rollout]) -> None:
    untold: list[Any] = []
    try:
        with torch.no_grad():  # which is a thread's own
            rollout = write(lambda *drawn: untold.append(drawn))
        future.set_result(Written(rollout, tuple(untold)))
    except BaseException as error:
        future.set_exception(error)
