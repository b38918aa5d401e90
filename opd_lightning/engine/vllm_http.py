"""A vLLM server's routes, as this package uses them (0.32, with --enable-scale-out and in development mode)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import ProxyHandler, Request, build_opener

from opd_lightning.engine.vllm_adapter import Drawn
from opd_lightning.errors import ConfigError, require
from opd_lightning.types import Sampling

_OPENER = build_opener(ProxyHandler({}))
"""A server is asked where its address says, whatever proxy the environment names."""

_MOST_BIASES = 1024
"""Ids outside the shared vocabulary that a request may name; padding of a head is a few hundred."""


FIRST = "default"
"""The version of the weights with which a server starts."""


class _Failed(ConfigError):
    """A request to ``path`` that came to nothing; ``said`` is why, in short."""

    def __init__(self, message: str, path: str, said: str) -> None:
        super().__init__(message)
        self.path, self.said = path, said


class Refused(_Failed):
    """The server answered with an error."""


class Unanswered(_Failed):
    """The server did not answer, or not in JSON."""


class Restarted(ConfigError):
    """A response was written with the weights that a server starts with, after others were sent."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A vLLM server at ``url``. Requests are tried ``1 + retries`` times, with 1, 2, 4, … seconds between.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        timeout_s: longest wait for one answer.
        retries: of requests that were not answered; those that were refused are not repeated.
        in_flight: requests at once.
    """

    url: str
    timeout_s: float
    retries: int
    in_flight: int

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the answer to a POST of ``body``, or to a GET where it is None.

        Raises:
            ConfigError: no answer (Unanswered) or a refusal (Refused); it names address, route and reason.
        """
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url.rstrip("/") + path, data, {"Content-Type": "application/json"})
        reason, said = "", None
        for attempt in range(1 + self.retries):
            try:
                with _OPENER.open(request, timeout=self.timeout_s) as answer:
                    text = answer.read()
                return json.loads(text) if text.strip() else None
            except HTTPError as error:
                said = error.read(1000).decode(errors="replace").strip()
                reason = f"{error.code} {said}"
                if error.code < 500:
                    break
            except ValueError:
                reason, said = f"no JSON, but {text[:60]!r}", None
                break
            except (URLError, TimeoutError, ConnectionError) as error:
                said = None
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(2.0**attempt)
        message = (
            f"`engine.url` must be a vLLM server that answers {path} within {self.timeout_s:g} s, got {self.url!r} "
            f"({reason[:300]}); start it with VLLM_SERVER_DEV_MODE=1 and the command of conf/engine/vllm_server.yaml"
        )
        raise Unanswered(message, path, reason) if said is None else Refused(message, path, said)

    def longest(self) -> int:
        """Return the most tokens of a prompt with its response.

        Raises:
            ConfigError: another kind of server.
        """
        answer = self.ask("/v1/models")
        with self._vllm("/v1/models"):
            return int(answer["data"][0]["max_model_len"])

    @contextmanager
    def _vllm(self, path: str) -> Iterator[None]:
        """Refuse a server whose answers are not read as vLLM's inside the block."""
        try:
            yield
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"`engine.url` must be a vLLM server (0.32), got {self.url!r}, which answers {path} in another way "
                f"({type(error).__name__}: {str(error)[:100]}); start it with the command of "
                "conf/engine/vllm_server.yaml"
            ) from error

    def reload(self, folder: Path, version: str) -> None:
        """Have the server take its weights from ``folder``; as :meth:`renew`."""

        def bring() -> None:
            arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self.ask("/collective_rpc", arguments)
            self.ask("/update_weight_version", {"new_version": version})

        self.renew(bring)

    def renew(self, bring: Callable[[], None]) -> None:
        """Have the server wait while ``bring`` gives it weights of another version; empty its prefix cache."""
        self.ask("/pause?mode=wait", {})
        try:
            bring()
            self.forget()
        except BaseException:
            with suppress(ConfigError):  # what went wrong before matters more
                replace(self, retries=0).ask("/resume", {})
            raise
        self.ask("/resume", {})

    def version(self) -> str:
        """Return the version of the weights that the server holds.

        Raises:
            ConfigError: a server without the route.
        """
        answer = self.ask("/weight_info")
        with self._vllm("/weight_info"):
            return str(answer["weight_version"])

    def workers(self) -> int:
        """Return how many processes of the server hold weights.

        Raises:
            ConfigError: a server without the route.
        """
        answer = self.ask("/get_world_size")
        with self._vllm("/get_world_size"):
            return int(answer["world_size"])

    def forget(self) -> None:
        """Drop the cached keys and values of earlier prompts."""
        self.ask("/reset_prefix_cache", {})

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each parameter, by worker and name.

        Raises:
            ConfigError: a server without the route.
        """
        answer = self.ask("/weight_checker", {"action": "checksum"})
        with self._vllm("/weight_checker"):
            return dict(answer["checksums"])

    def draw(
        self,
        rows: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        width: int,
        version: str,
    ) -> list[Drawn]:
        """Draw one response for each row of prompt ids, for a head ``width`` ids wide.

        Raises:
            ConfigError: a response that another version of the weights wrote, if only a part of it.
            Restarted: that version is the one with which a server starts.
        """
        params = _parameters(sampling, width)

        def one(row: Sequence[int], seed: int) -> Drawn:
            body = {"token_ids": list(row), "sampling_params": params | {"seed": seed}}
            answer = self.ask("/inference/v1/generate", body)
            with self._vllm("/inference/v1/generate"):
                (choice,) = answer["choices"]
                wrote = {span["version"] for span in choice["weight_versions"] or ()}
                drawn = _drawn(choice, sampling.top_ids)
            if wrote == {FIRST} != {version}:
                raise Restarted(
                    f"`engine.url` must stay one server, got {self.url!r}, which was started again since weights "
                    "were sent to it; resume the run from its last checkpoint"
                )
            require(
                wrote == {version},
                "engine.url",
                f"write with the weights of version {version}",
                sorted(wrote),
                "give each run a server of its own",
            )
            return drawn

        # Its threads end with the process: neither an error nor a stop waits for the answers that are left.
        with ThreadPool(self.in_flight) as threads:
            return list(threads.imap(lambda asked: one(*asked), zip(rows, seeds, strict=True)))


def check_url(url: object) -> None:
    """Raise ConfigError unless ``url`` is an http address."""
    parts = urlparse(url) if isinstance(url, str) else None
    good = (
        parts is not None
        and parts.scheme in ("http", "https")
        and bool(parts.netloc)
        and "@" not in parts.netloc
    )
    remedy = "use http://127.0.0.1:8000, without a user and a password"
    require(good, "engine.url", "be an http address", url, remedy)


def _parameters(sampling: Sampling, width: int) -> dict[str, Any]:
    outside = range(width if sampling.vocab is None else sampling.vocab, width)
    require(
        len(outside) <= _MOST_BIASES,
        "engine",
        f"leave out at most {_MOST_BIASES} ids of the student's head with a server",
        len(outside),
        "use engine=vllm",
    )
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,
        "logprobs": sampling.top_ids + 1 if sampling.top_ids else 0,  # the drawn id takes one place
        "detokenize": False,
        # The largest that a server takes: a probability below 1e-43 times what it was.
        "logit_bias": {str(i): -100.0 for i in outside} or None,
    }


def _drawn(choice: Mapping[str, Any], top: int) -> Drawn:
    content = choice["logprobs"]["content"]

    def ranked(others: Sequence[Mapping[str, Any]]) -> list[int]:
        return [other["token_id"] for other in sorted(others, key=lambda other: other["rank"])][:top]

    return Drawn(
        ids=list(choice["token_ids"]),
        logp=[token["logprob"] for token in content],
        top=[ranked(token["top_logprobs"]) for token in content] if top else [[] for _ in content],
        stopped=choice["finish_reason"] == "stop",
    )
