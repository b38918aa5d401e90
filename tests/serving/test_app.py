"""The server over real sockets: what it refuses, that it stays alive, and many clients at once."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from tiny import random_rollout

from opd_lightning.serving.wire import ScoreAnswer, ScoreRequest, Wanted
from serving.servers import VOCAB, a_bench, serving

WANTED = Wanted(vocab=VOCAB, taken=True, entropy=True, top=4)


def request(rows: int = 4, seed: int = 0, wanted: Wanted = WANTED, **sizes) -> ScoreRequest:
    tokens = random_rollout(rows, vocab=VOCAB, seed=seed, **sizes).tokens
    return ScoreRequest.of(tokens, tokens.ids.unsqueeze(-1), wanted)


@pytest.fixture(scope="module")
def server():
    with serving(a_bench()) as (address, service):
        yield address, service


@pytest.fixture
def client(server):
    with httpx2.Client(base_url=server[0], trust_env=False, timeout=60) as client:
        yield client


def answers(client, seed: int = 0) -> ScoreAnswer:
    asked = request(seed=seed)
    response = client.post("/score", content=asked.write())
    assert response.status_code == 200, response.text
    return ScoreAnswer.read(response.content, asked)


def test_scores_over_http_are_those_of_the_bench(client, server):
    said, (own,) = answers(client), server[1].bench.score([request()])
    for name in ("taken", "given", "entropy", "top_ids", "top_logp"):
        assert torch.equal(getattr(said, name), getattr(own, name))


def test_health_info_and_metrics(client, server):
    answers(client)
    assert client.get("/health").text == "ok\n"
    assert client.get("/info").json()["vocab"] == VOCAB
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    numbers = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert float(numbers['opd_teacher_requests_total{status="200"}']) >= 1
    assert float(numbers["opd_teacher_tokens_total"]) >= len(request().ids)
    assert float(numbers["opd_teacher_held_bytes"]) == 0


def whole(rows: int) -> ScoreRequest:
    return request(rows, time=60, prompt=4)


BODY = request().write()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"garbage", 400, "safetensors"),
        (b"", 400, "safetensors"),
        (BODY[:-3], 400, "safetensors"),
        (BODY[: len(BODY) // 2], 400, "safetensors"),
        (b"\x80\x04cposix\nsystem\n.", 400, "safetensors"),
        (b"\xff" * 8 + BODY[8:], 400, "safetensors"),
        (dataclasses.replace(request(), ids=request().ids + VOCAB).write(), 400, "ids must be below 448"),
        (
            dataclasses.replace(request(), given=request().given - VOCAB).write(),
            400,
            "given must be below 448",
        ),
        (request(2, prompt=60, time=60).write(), 400, "a row may have at most 64 tokens"),
        (request(wanted=dataclasses.replace(WANTED, top=40)).write(), 400, "at most 32 ids"),
        (bytes(2**20 + 1), 413, "at most 1048576 bytes"),
        (
            request(900, time=50, prompt=4, wanted=dataclasses.replace(WANTED, top=31)).write(),
            413,
            "the answer may",
        ),
    ],
)
def test_what_is_refused_and_the_server_alive(client, server, body, status, says):
    response = client.post("/score", content=body)
    assert response.status_code == status
    assert says in response.text
    assert len(response.text.strip().splitlines()) == 1
    answers(client)
    assert server[1].room.held == 0


def raw(address: str, data: bytes) -> bytes:
    """Send bytes over a socket, close our half, and return what comes back."""
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=20) as talk:
        talk.sendall(data)
        talk.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: talk.recv(4096), b""))


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (
            b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            b"411",
        ),
        (b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", b"413"),
        (b"\x00\x01\x02 no HTTP at all\r\n\r\n", b"400"),
        (b"GET /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"405"),
    ],
)
def test_broken_http_is_refused(client, server, head, status):
    assert status in raw(server[0], head).split(b"\r\n")[0]
    answers(client)


def test_a_client_that_leaves_in_the_middle_holds_nothing(client, server):
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + BODY[:100]
    raw(server[0], head)
    for _ in range(100):
        if server[1].room.held == 0 and server[1].counters.answers[499]:
            break
        time.sleep(0.05)
    assert server[1].room.held == 0
    assert server[1].counters.answers[499]
    answers(client)


def test_a_token_is_asked_for_where_one_is_set():
    with (
        serving(a_bench(), token="secret") as (address, _),
        httpx2.Client(base_url=address, trust_env=False) as c,
    ):
        right = {"Authorization": "Bearer secret"}
        for path, method in (("/info", c.get), ("/metrics", c.get), ("/score", c.post)):
            assert method(path).status_code == 401
            assert method(path, headers={"Authorization": "Bearer \xe9".encode()}).status_code == 401
            assert method(path, headers=right).status_code != 401
        assert c.get("/health").status_code == 200
        assert "secret" not in c.get("/info", headers=right).text


def test_what_does_not_fit_comes_again_later():
    asked = request(200, time=40)
    size = len(asked.write()) + asked.answer_bytes
    with (
        serving(a_bench(), held=size + 2000) as (address, service),
        httpx2.Client(base_url=address, trust_env=False, timeout=60) as client,
    ):
        assert service.room.take(3000)
        full = client.post("/score", content=asked.write())
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        service.room.give_back(3000)
        assert client.post("/score", content=asked.write()).status_code == 200
        # The answer is on its way before the server has put its own record of it in order.
        deadline = time.monotonic() + 30
        while service.room.held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.room.held == 0


def test_64_clients_at_once_are_answered_in_bounded_memory():
    """Each gets its own scores; the bytes held never exceed the limit; several requests share a pass."""
    body = request(8, time=20).write()
    limit = 24 * (len(body) + request(8, time=20).answer_bytes)
    together, peak = threading.Barrier(64), [0]
    bench = a_bench()
    with serving(bench, held=limit) as (address, service):
        take = service.room.take

        def watched(size: int) -> bool:
            held = take(size)
            peak[0] = max(peak[0], service.room.held)
            return held

        service.room.take = watched  # type: ignore[method-assign]

        def one(seed: int) -> bool:
            asked = request(8, seed, time=20)
            with httpx2.Client(base_url=address, trust_env=False, timeout=120) as client:
                together.wait()
                response = client.post("/score", content=asked.write())
                while response.status_code == 503:
                    time.sleep(0.2)
                    response = client.post("/score", content=asked.write())
            said, (own,) = ScoreAnswer.read(response.content, asked), bench.score([asked])
            return torch.allclose(said.taken, own.taken, atol=1e-5)

        with ThreadPoolExecutor(64) as clients:
            assert all(clients.map(one, range(64)))
        assert service.counters.answers[200] == 64
        assert service.counters.batches < 64
        assert 0 < peak[0] <= limit
        assert service.room.held == 0
