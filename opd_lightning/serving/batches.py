"""Requests of several clients on their way to one model: counted in bytes, scored together, in turn."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from opd_lightning.serving.metrics import Counters
from opd_lightning.serving.wire import ScoreAnswer, ScoreRequest


@dataclass
class Room:
    """Bytes that requests and answers may hold in all; what does not fit has to come again."""

    limit: int
    held: int = 0

    def take(self, size: int) -> bool:
        """Hold so many bytes more, or return False and hold nothing."""
        if self.held + size > self.limit:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        """Let go of so many bytes."""
        self.held -= size


@dataclass
class Batches:
    """Scores requests one group after another, in a thread of its own.

    While a group is scored the next requests gather. A group is the request that has waited longest and those
    behind it with an equal key, as far as their tokens fit the budget; nobody waits for company.

    Args:
        score: answers requests with equal keys.
        tokens: most tokens of a group; a request that is larger goes alone.
        counters: are told of each group.
    """

    score: Callable[[Sequence[ScoreRequest]], list[ScoreAnswer]]
    tokens: int
    counters: Counters
    waiting: deque[tuple[ScoreRequest, asyncio.Future[ScoreAnswer]]] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, request: ScoreRequest) -> ScoreAnswer:
        """Return the answer to a request, when its turn has come."""
        answer: asyncio.Future[ScoreAnswer] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, answer))
        self._arrived.set()
        return await answer

    async def run(self) -> None:
        """Score groups until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "scoring") as thread:
            while True:
                await self._arrived.wait()
                if not (group := self._next()):
                    self._arrived.clear()
                    continue
                begun = time.perf_counter()
                requests = [request for request, _ in group]
                try:
                    answers = await loop.run_in_executor(thread, self.score, requests)
                except Exception as error:
                    for _, answer in group:
                        if not answer.done():
                            answer.set_exception(error)
                else:
                    for (_, answer), said in zip(group, answers, strict=True):
                        if not answer.done():
                            answer.set_result(said)
                self.counters.busy += time.perf_counter() - begun
                self.counters.batches += 1
                self.counters.together += len(group)
                self.counters.tokens += sum(len(request.ids) for request in requests)

    def _next(self) -> list[tuple[ScoreRequest, asyncio.Future[ScoreAnswer]]]:
        """Take the next group; requests whose client has gone are dropped."""
        group: list[tuple[ScoreRequest, asyncio.Future[ScoreAnswer]]] = []
        left: deque[tuple[ScoreRequest, asyncio.Future[ScoreAnswer]]] = deque()
        tokens = 0
        for request, answer in self.waiting:
            if answer.done():
                continue
            same = not group or request.key == group[0][0].key
            if same and (not group or tokens + len(request.ids) <= self.tokens):
                group.append((request, answer))
                tokens += len(request.ids)
            else:
                left.append((request, answer))
        self.waiting = left
        return group
