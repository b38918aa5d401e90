"""What a vLLM server is asked beside the log-probs of prompts, and what its refusals mean."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.loading import Loading
from opd_lightning.serving.client import Connection

Entry = Mapping[str, Mapping[str, Any]]
"""What a server says of one position: from token ids to ``{"logprob": …, "rank": …}``."""

_IN_FLIGHT = 32
"""Requests at once, of one row each."""


@dataclass(frozen=True)
class GivenIds:
    """Asks a vLLM server for log-probs at given ids, others at each position (``prompt_logprob_token_ids``).

    vLLM 0.32 has them in its second model runner alone, which needs a GPU, and says them on the route of
    ``--enable-scale-out``: one row a request, an answer of 5 bytes an id.
    """

    connection: Connection

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        given: Int[Tensor, "batch time k"],
        mask: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch time k"]:
        """Return the log-probs at ``given``, nats, for the last tokens of each row, as many as ``mask`` says.

        Raises:
            ConfigError: the server cannot, or its answer has another shape.
        """
        lengths = mask.sum(-1).tolist()
        asked = [(row, ids[:n].tolist()) for row, ids, n in zip(rows, given, lengths, strict=True) if n]
        with ThreadPoolExecutor(_IN_FLIGHT) as threads:
            answers = iter(list(threads.map(lambda pair: self.ask(*pair), asked)))
        logp = torch.zeros(given.shape)
        for row, length in enumerate(lengths):
            if length:
                logp[row, :length] = next(answers)
        return logp

    def ask(self, row: Sequence[int], ids: Sequence[Sequence[int]]) -> Float[Tensor, "time k"]:
        """Return the log-probs of ``ids`` as the last ``len(ids)`` tokens of one row."""
        settings = {
            "max_tokens": 1,
            "temperature": 0,
            "detokenize": False,
            "prompt_logprob_token_ids": [list(place) for place in ids],
            "prompt_logprob_start": len(row) - 1 - len(ids),
        }
        body = json.dumps({"token_ids": list(row), "sampling_params": settings}).encode()
        response = self.connection.post("/inference/v1/generate", body, "application/json")
        if response.status_code != 200:
            raise self._lacking(f"status {response.status_code}: {response.text}", len(ids[0]))
        try:
            said = base64.b64decode(response.json()["prompt_token_id_logprobs"], validate=True)
            logp = torch.from_numpy(np.load(io.BytesIO(said), allow_pickle=False)).float()
        except (KeyError, TypeError, ValueError, EOFError):
            raise self._lacking("an answer without them", len(ids[0])) from None
        if logp.shape != (len(ids), len(ids[0])) or not bool(logp.isfinite().all()):
            raise self._lacking(f"other numbers, of shape {tuple(logp.shape)}", len(ids[0]))
        return logp

    def _lacking(self, said: str, count: int) -> ConfigError:
        words = " ".join(said.split())[:300]
        remedy = "use support=teacher, or teacher=served"
        if "V2 model runner" in words:
            remedy = "run the server on a GPU, or " + remedy
        elif words.startswith(("status 403", "status 404")):
            remedy = "start the server with --enable-scale-out, or " + remedy
        elif "max_logprobs" in words:
            remedy = f"start the server with --max-logprobs {count}, or lower support.k"
        return ConfigError(
            f"`teacher.given_ids` must be false with a vLLM server that gives no log-probs at given ids, got from "
            f"{self.connection.address} {words}; {remedy}"
        )


def served(connection: Connection) -> tuple[str, int]:
    """Return the name and the context of the model that the server has."""
    response = connection.get("/v1/models")
    if response.status_code != 200:
        raise refusal(connection, response.status_code, response.text, 0)
    try:
        (model, *_) = response.json()["data"]
        return str(model["id"]), int(model["max_model_len"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`teacher.address` must name a vLLM server, got {connection.address}, which is another one; use "
            "teacher=served for a server of serve_teacher"
        ) from error


def said_of_prompts(connection: Connection, response: httpx2.Response) -> list[list[Entry | None]]:
    """Return what is said of each position of each prompt, in their order.

    Raises:
        ConfigError: the answer is of another kind, as of a server that leaves out ``prompt_logprobs``.
    """
    try:
        choices = sorted(response.json()["choices"], key=lambda choice: int(choice["index"]))
        return [list(choice["prompt_logprobs"]) for choice in choices]
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`teacher.address` must name a vLLM server, which gives log-probs of prompts, got {connection.address}, "
            f"which answers in another way ({type(error).__name__}: {str(error)[:100]}); use teacher=served for a "
            "server of serve_teacher"
        ) from error


_TOO_MANY = 2**30
"""Top ids that no server gives: its refusal names the most that it does, and nothing is scored."""


def most_ranked(connection: Connection, model: str) -> int | None:
    """Return the server's ``--max-logprobs``, None where its refusal does not say it.

    Raises:
        ServerGone: the server does not answer.
    """
    body = {"model": model, "prompt": [[0, 0]], "max_tokens": 1, "prompt_logprobs": _TOO_MANY}
    response = connection.post("/v1/completions", json.dumps(body).encode(), "application/json")
    said = re.search(r"max allowed: (\d+)", response.text)
    return int(said[1]) if response.status_code == 400 and said else None


def refusal(connection: Connection, status: int, said: str, top: int) -> ConfigError:
    """Return the error of a request that the server refused, with the flag that lets it pass."""
    words = " ".join(said.split())[:300]
    remedies = {
        401: "set teacher.token_env to the variable with its API key",
        404: "leave the path out of it",
    }
    remedy = remedies.get(status, "see the server's own output")
    if "logprobs" in words and top:
        remedy = f"start it with --max-logprobs {top}, or set support.k to what it allows"
    return ConfigError(
        f"`teacher.address` must name a vLLM server that accepts these requests, got status {status} from "
        f"{connection.address} ({words}); {remedy}"
    )


_TOLERANCE = 0.05
"""Nats between two requests for the same tokens; another position or a wrong cache gives more."""


def check_alignment(
    entries: Callable[[Sequence[Sequence[int]], int], list[list[Entry | None]]],
    loading: Loading,
    given: GivenIds | None,
) -> None:
    """Refuse a teacher whose log-probs are not those of the token at their own position.

    Of two rows that differ in the last token alone, everything before it must be scored alike; and a row asked
    alone as beside another. ``entries`` asks for the top ids, ``given`` for given ones.

    Raises:
        ConfigError: they are not; given ids cannot be scored.
    """
    ids = loading.tokenizer("What is 12 plus 30? It is 42.", add_special_tokens=False)["input_ids"]
    text = [i for i in ids if i < loading.vocab][:12]
    other = next(i for i in text if i != text[-1])
    one, two = entries([text, [*text[:-1], other]], 1)
    (alone,) = entries([text], 1)

    def logp(entries: Sequence[Entry | None], end: int | None = None) -> Tensor:
        pairs = zip(text[1:end], entries[1:end], strict=True)
        return torch.tensor([entry[str(i)]["logprob"] for i, entry in pairs if entry is not None])

    gap = max(float((logp(one, -1) - logp(row, -1)).abs().max()) for row in (two, alone))
    require(
        gap <= _TOLERANCE,
        "teacher.address",
        "score a token by what stands before it alone",
        f"a difference of {gap:.3g} nats",
        "start the server without features that change log-probs",
    )
    if given is not None:
        _check_given(given, text, logp(one))


def _check_given(given: GivenIds, text: Sequence[int], logp: Float[Tensor, " time"]) -> None:
    """Refuse numbers of another position, or of another id: ``logp`` is what the same server says of the text.

    All of the text is asked for, and its last three tokens alone; the taken token stands beside another id.
    """
    for count in (len(text) - 1, 3):
        asked = [[text[place - 1], text[place]] for place in range(len(text) - count, len(text))]
        gap = float((given.ask(text, asked)[:, 1] - logp[-count:]).abs().max())
        require(
            gap <= _TOLERANCE,
            "teacher.given_ids",
            "be false unless the server scores given ids at their own position",
            f"a difference of {gap:.3g} nats",
            "use vLLM 0.32, or support=teacher",
        )
