"""The client's half of HTTP: one server, its token, time-outs, and patience with a server that is gone."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field

import httpx2

from opd_lightning.errors import ConfigError

_GONE = (502, 503, 504)
"""What a server that is full says, or a proxy in front of one that is away."""

_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 5.0


def read_token(variable: str) -> str | None:
    """Return the token that an environment variable holds, None where it is unset or empty.

    Raises:
        ConfigError: one that a header cannot carry; it is not shown.
    """
    token = os.environ.get(variable, "").strip()
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(
            f"the environment variable `{variable}` must hold a token of printable ASCII, got other characters; "
            "make one with `openssl rand -hex 32`"
        )
    return token or None


class ServerGone(ConfigError):
    """A server that has not answered for as long as was waited for it."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Requests to a server. Can be pickled and forked: each process opens connections of its own.

    Args:
        address: ``http://host:port``, or https behind a proxy that has a certificate.
        token: sent with each request, None for none.
        timeout_s: for the answer to one request.
        patience_s: from the first failure on, how long a server that is gone is waited for.
        owner: what names the address, for errors.
    """

    address: str
    token: str | None
    timeout_s: float
    patience_s: float
    owner: str
    _clients: dict[int, httpx2.Client] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_clients": {}}

    def get(self, path: str) -> httpx2.Response:
        """Return the answer to a GET; see :meth:`post`."""
        return self._ask("GET", path, None, {})

    def post(self, path: str, body: bytes, kind: str) -> httpx2.Response:
        """Return the answer to a POST, whatever its status, but for that of a server that is full or gone.

        Raises:
            ServerGone: none came for ``patience_s``.
        """
        return self._ask("POST", path, body, {"Content-Type": kind})

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> httpx2.Response:
        begun: float | None = None
        said, pause = 0.0, 0.25
        while True:
            try:
                response = self._client.request(method, self.address + path, content=body, headers=headers)
                reason = f"status {response.status_code}" if response.status_code in _GONE else None
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
            now = time.monotonic()
            if reason is None:
                if begun is not None and said:
                    _say(f"the teacher at {self.address} answers again after {now - begun:.0f} s")
                return response
            begun = begun or now
            left = self.patience_s - (now - begun)
            if left <= 0:
                raise ServerGone(
                    f"`{self.owner}` must name a server that answers, got none from {self.address} for "
                    f"{now - begun:.0f} s ({reason}); start it again, or raise teacher.patience_s={self.patience_s:g}"
                )
            # A full server asks for a second's pause all the time, and is no news.
            if now - begun >= 1 and now >= said + min(30.0, self.patience_s / 4):
                said = now
                _say(
                    f"no answer from the teacher at {self.address} ({reason}): waiting up to {left:.0f} s more"
                )
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)

    @property
    def _client(self) -> httpx2.Client:
        """This process's client: a fork must not write into its parent's connections."""
        client = self._clients.get(os.getpid())
        if client is None:
            self._clients.clear()
            headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
            timeout = httpx2.Timeout(self.timeout_s, connect=min(_CONNECT_SECONDS, self.timeout_s))
            # A proxy of the environment is for the world outside, and a teacher is on one's own machines.
            client = httpx2.Client(headers=headers, timeout=timeout, trust_env=False)
            self._clients[os.getpid()] = client
        return client


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
