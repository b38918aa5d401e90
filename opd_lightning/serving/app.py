"""The scoring server: HTTP around a :class:`~opd_lightning.serving.bench.Bench`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from opd_lightning.serving.batches import Batches, Room
from opd_lightning.serving.bench import Bench
from opd_lightning.serving.metrics import Counters
from opd_lightning.serving.wire import KIND, ScoreRequest, WireError

log = logging.getLogger(__name__)

_BODY_SECONDS = 60
"""In which a request must have arrived."""


class Refused(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Service:
    """``POST /score``, and ``GET`` ``/info``, ``/metrics`` and ``/health``.

    Args:
        bench: scores.
        room: bytes that may be held for requests and answers at once; what is over gets 503 and comes again.
        token: what clients must bring as ``Authorization: Bearer``, None for nothing; ``/health`` is for all.
    """

    bench: Bench
    room: Room
    token: str | None
    counters: Counters
    batches: Batches

    @classmethod
    def of(cls, bench: Bench, held_bytes: int, token: str | None) -> Service:
        """Return the service of a model."""
        counters = Counters()
        batches = Batches(bench.score, bench.tokens, counters)
        return cls(bench=bench, room=Room(held_bytes), token=token, counters=counters, batches=batches)

    def application(self) -> Starlette:
        """Return the ASGI application."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            scoring = asyncio.create_task(self.batches.run())
            yield
            scoring.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await scoring

        routes = [
            Route("/score", Score(self), methods=["POST"]),
            Route("/info", self._info),
            Route("/metrics", self._metrics),
            Route("/health", self._health),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    def check_token(self, request: Request) -> None:
        """Refuse a client without the token."""
        if self.token is None:
            return
        brought = request.headers.get("authorization", "")
        # As bytes: compare_digest refuses text that is not ASCII.
        if not hmac.compare_digest(brought.encode(), f"Bearer {self.token}".encode()):
            raise Refused(401, "the token is missing or wrong")

    async def _info(self, request: Request) -> Response:
        try:
            self.check_token(request)
        except Refused as refused:
            return _sentence(refused)
        return JSONResponse(self.bench.info.words())

    async def _metrics(self, request: Request) -> Response:
        try:
            self.check_token(request)
        except Refused as refused:
            return _sentence(refused)
        text = self.counters.text(len(self.batches.waiting), self.room.held)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _health(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")


class Score:
    """``POST /score`` as an ASGI application: the bytes of a request count until its answer has been sent."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request, held = Request(scope, receive), [0]
        counters = self.service.counters
        try:
            try:
                response = await self._answer(request, held)
            except Refused as refused:
                response = _sentence(refused)
            except ClientDisconnect:
                counters.answers[499] += 1
                return
            counters.answers[response.status_code] += 1
            await response(scope, receive, send)
        finally:
            self.service.room.give_back(held[0])

    async def _answer(self, request: Request, held: list[int]) -> Response:
        service = self.service
        service.check_token(request)
        body = await self._body(request, held)
        service.counters.received += len(body)
        try:
            asked = await asyncio.to_thread(ScoreRequest.read, body)
            service.bench.check(asked)
        except WireError as error:
            raise Refused(400, str(error)) from None
        most = service.bench.info.most_bytes
        if asked.answer_bytes > most:
            raise Refused(
                413, f"the answer may hold at most {most} bytes, got {asked.answer_bytes}; ask in parts"
            )
        self._hold(asked.answer_bytes, held)
        try:
            said = await service.batches.ask(asked)
        except Exception as error:
            log.exception("a group of requests could not be scored")
            raise Refused(500, f"scoring failed: {type(error).__name__}") from None
        answer = await asyncio.to_thread(said.write)
        service.counters.sent += len(answer)
        return Response(answer, media_type=KIND)

    async def _body(self, request: Request, held: list[int]) -> bytes:
        """Read the body, of a length that is known and allowed before the first byte."""
        try:
            length = int(request.headers["content-length"])
        except (KeyError, ValueError):
            raise Refused(411, "the request must say its length") from None
        most = self.service.bench.info.most_bytes
        if length > most:
            raise Refused(413, f"a request may have at most {most} bytes, got {length}")
        self._hold(length, held)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
        except TimeoutError:
            raise Refused(408, f"the request must arrive within {_BODY_SECONDS} s") from None
        return bytes(body)

    def _hold(self, size: int, held: list[int]) -> None:
        if not self.service.room.take(size):
            raise Refused(503, "too many requests wait; come again")
        held[0] += size


def _sentence(refused: Refused) -> Response:
    more = {"Retry-After": "1"} if refused.status == 503 else {}
    return PlainTextResponse(f"{refused}\n", refused.status, headers=more)
