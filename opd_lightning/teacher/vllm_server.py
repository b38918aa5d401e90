"""A teacher behind any vLLM server: its own top ids, read from the log-probs that it gives of a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.loading import Limits, Loading
from opd_lightning.schedule import within
from opd_lightning.serving.client import Connection, read_token
from opd_lightning.types import Scores, TokenBatch, Want

_IN_FLIGHT = 4
"""Requests at once: a server batches them, and their JSON is read meanwhile."""

Entry = Mapping[str, Mapping[str, Any]]
"""What a server says of one position: from token ids to ``{"logprob": …, "rank": …}``."""


@dataclass(frozen=True, kw_only=True)
class VllmTeacher:
    """Names an OpenAI-compatible vLLM server, which gives its own top ids and the taken token, and no others.

    Log-probs are at temperature 1 over the whole width of the teacher's head, padding included.

    Args:
        address: ``http://host:port``.
        path: folder or hub name of the same model, of which only configuration and tokenizer are read.
        token_env: the environment variable that holds the server's API key; unset for none.
        timeout_s: for the answer to one request, in seconds.
        patience_s: how long a server that is gone is waited for, in seconds.
        tokens_per_request: most tokens of a request, prompts included; a longer row goes alone.
        scoring_temperature: None for the student's, which must be 1.

    Raises:
        ConfigError: a field out of its range.
    """

    address: str
    path: str
    token_env: str
    timeout_s: float
    patience_s: float
    tokens_per_request: int
    scoring_temperature: float | None = None

    gives_hidden = False
    """Hidden states are not sent."""
    scores_given_ids = False
    """Beside the taken token it scores its own top ids alone."""
    dtype = "float32"
    """Of the log-probs that come."""

    def __post_init__(self) -> None:
        holds = isinstance(self.address, str) and re.match(r"https?://[^/@?]+/?$", self.address)
        require(
            bool(holds),
            "teacher.address",
            "be like http://127.0.0.1:8000",
            self.address,
            "leave out the path",
        )
        for name, least in (("timeout_s", 1e-3), ("patience_s", 0.0)):
            value = getattr(self, name)
            require(within(value, least, 1e9), f"teacher.{name}", "be a number of seconds", value, "use 300")
        tokens = self.tokens_per_request
        whole = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1
        require(whole, "teacher.tokens_per_request", "be at least 1", tokens, "use 8192")

    def check_temperature(self, temperature: float) -> None:
        """Refuse a temperature that the server gives no log-probs at."""
        require(
            temperature == 1,
            "student.scoring_temperature",
            "be 1 with a vLLM server, which gives log-probs at no other",
            temperature,
            "use 1, or teacher=served",
        )

    @property
    def connection(self) -> Connection:
        """A connection to the server."""
        return Connection(
            address=self.address.rstrip("/"),
            token=read_token(self.token_env),
            timeout_s=self.timeout_s,
            patience_s=self.patience_s,
            owner="teacher.address",
        )

    def limits(self) -> Limits:
        """Return what the server takes; it draws a token behind each row.

        Raises:
            ConfigError: it is gone or another one.
        """
        return Limits(tokens=_served(self.connection)[1] - 1, ids=None)

    def load(self, loading: Loading) -> VllmScorer:
        """Return the teacher, after a check that its log-probs belong to the tokens that they are asked for.

        Raises:
            ConfigError: another temperature than 1; the server is gone, or what it says is misaligned.
        """
        loading.check_temperature(self.scoring_temperature, "teacher.scoring_temperature")
        self.check_temperature(loading.temperature)
        connection = self.connection
        model, context = _served(connection)
        scorer = VllmScorer(
            connection=connection,
            model=model,
            context=context,
            vocab=loading.vocab,
            tokens=self.tokens_per_request,
        )
        check_alignment(scorer, loading)
        return scorer


@dataclass(frozen=True, kw_only=True)
class VllmScorer:
    """Asks a vLLM server for log-probs of whole sequences as prompts; it draws one token, which is dropped.

    Args:
        connection: to the server.
        model: the name under which it serves the teacher.
        context: most tokens of a row with the one that is drawn.
        vocab: ids that both models know.
        tokens: most tokens of a request, prompts included.
    """

    connection: Connection
    model: str
    context: int
    vocab: int
    tokens: int

    scores_given_ids = False
    """Beside the taken token it scores its own top ids alone."""
    gives_entropy = False
    """A few log-probs do not tell it."""

    @torch.no_grad()
    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Return the taken tokens' and the top ids' log-probs; entropy is None, which a few numbers do not tell.

        Raises:
            ConfigError: ids are given that are not the taken ones; hidden states are wanted; a row is longer
                than the teacher's context; the server refuses, or is gone.
        """
        taken = support_ids is None or torch.equal(support_ids, tokens.ids.unsqueeze(-1))
        if want.hidden or want.full or not taken:
            raise ConfigError(
                f"`support` must be the teacher's own top ids with the vLLM server at {self.connection.address}, got "
                "ids or states that it does not give; use support=teacher, or teacher=served"
            )
        rows = [
            prompt[keep].tolist() + ids[mask].tolist()
            for prompt, keep, ids, mask in zip(
                tokens.prompt_ids, tokens.prompt_mask, tokens.ids, tokens.mask, strict=True
            )
        ]
        entries = self.entries(rows, want.top)
        taken_logp = torch.zeros(tokens.ids.shape)
        top_ids = torch.zeros(*tokens.ids.shape, want.top, dtype=torch.long)
        top_logp = torch.zeros(top_ids.shape)
        for row, length in enumerate(tokens.mask.sum(-1).tolist()):
            if not length:
                continue
            text = rows[row][-length:]
            said: list[Entry] = [entry or {} for entry in entries[row][-length:]]
            taken_logp[row, :length] = torch.tensor(
                [entry[str(i)]["logprob"] for i, entry in zip(text, said, strict=True)]
            )
            if want.top:
                best = [self._best(entry, want.top) for entry in said]
                top_ids[row, :length] = torch.tensor([[i for i, _ in pairs] for pairs in best])
                top_logp[row, :length] = torch.tensor([[logp for _, logp in pairs] for pairs in best])
        device = tokens.ids.device
        taken_logp, top_logp = taken_logp.to(device), top_logp.to(device)
        return Scores(
            taken_logp=taken_logp,
            support_logp=None if want.support == "none" else taken_logp.unsqueeze(-1),
            top_ids=top_ids.to(device) if want.top else None,
            top_logp=top_logp if want.top else None,
        )

    def entries(self, rows: Sequence[Sequence[int]], top: int) -> list[list[Entry | None]]:
        """Return what the server says of each position of each row, the first of which has nothing before it."""
        longest = max(map(len, rows))
        require(
            longest < self.context,
            "teacher.address",
            f"name a teacher with a context above {longest} tokens, the longest prompt with its response",
            self.context,
            "lower rollout.max_new_tokens or collector.max_prompt_tokens, or raise the server's --max-model-len",
        )
        with ThreadPoolExecutor(_IN_FLIGHT) as threads:
            parts = list(threads.map(lambda part: self._ask(part, top), self._requests(rows)))
        return [entry for part in parts for entry in part]

    def _requests(self, rows: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
        """Yield the rows of each request, in their order."""
        begin, size = 0, 0
        for place, row in enumerate(rows):
            if size and size + len(row) > self.tokens:
                yield rows[begin:place]
                begin, size = place, 0
            size += len(row)
        yield rows[begin:]

    def _ask(self, rows: Sequence[Sequence[int]], top: int) -> list[list[Entry | None]]:
        settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": top, "add_special_tokens": False}
        body = {"model": self.model, "prompt": [list(row) for row in rows], **settings}
        response = self.connection.post("/v1/completions", json.dumps(body).encode(), "application/json")
        if response.status_code != 200:
            raise _refusal(self.connection, response.status_code, response.text, top)
        choices = sorted(response.json()["choices"], key=lambda choice: int(choice["index"]))
        answer: list[list[Entry | None]] = [choice["prompt_logprobs"] for choice in choices]
        for row, entries in zip(rows, answer, strict=True):
            own = len(entries) == len(row) and all(
                entry is not None and str(i) in entry for i, entry in zip(row[1:], entries[1:], strict=True)
            )
            require(
                own,
                "teacher.address",
                "give each token the log-prob at its own position",
                "other tokens",
                "use vLLM 0.32, with no feature that changes prompts",
            )
        return answer

    def _best(self, entry: Entry, top: int) -> list[tuple[int, float]]:
        """Return the likeliest ``top`` ids, best first; the taken one may stand beside them."""
        ranked = sorted(entry.items(), key=lambda pair: int(pair[1]["rank"]))
        best = [(int(i), float(said["logprob"])) for i, said in ranked][:top]
        shared = len(best) == top and all(i < self.vocab for i, _ in best)
        require(
            shared,
            "teacher.address",
            f"rank {top} ids below the shared vocabulary's {self.vocab} first",
            [i for i, _ in best],
            "use teacher=served, which ranks the shared ones alone",
        )
        return best


def _served(connection: Connection) -> tuple[str, int]:
    """Return the name and the context of the model that the server has."""
    response = connection.get("/v1/models")
    if response.status_code != 200:
        raise _refusal(connection, response.status_code, response.text, 0)
    try:
        (model, *_) = response.json()["data"]
        return str(model["id"]), int(model["max_model_len"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`teacher.address` must name a vLLM server, got {connection.address}, which is another one; use "
            "teacher=served for a server of serve_teacher"
        ) from error


def _refusal(connection: Connection, status: int, said: str, top: int) -> ConfigError:
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


def check_alignment(scorer: VllmScorer, loading: Loading) -> None:
    """Refuse a teacher whose log-probs are not those of the token at their own position.

    Of two rows that differ in the last token alone, everything before it must be scored alike; and a row asked
    alone as beside another.

    Raises:
        ConfigError: they are not.
    """
    ids = loading.tokenizer("What is 12 plus 30? It is 42.", add_special_tokens=False)["input_ids"]
    text = [i for i in ids if i < scorer.vocab][:12]
    other = next(i for i in text if i != text[-1])
    one, two = scorer.entries([text, [*text[:-1], other]], 1)
    (alone,) = scorer.entries([text], 1)

    def logp(entries: Sequence[Entry | None]) -> Tensor:
        pairs = zip(text[1:-1], entries[1:-1], strict=True)
        return torch.tensor([entry[str(i)]["logprob"] for i, entry in pairs if entry is not None])

    gap = max(float((logp(one) - logp(row)).abs().max()) for row in (two, alone))
    require(
        gap <= _TOLERANCE,
        "teacher.address",
        "score a token by what stands before it alone",
        f"a difference of {gap:.3g} nats",
        "start the server without features that change log-probs",
    )
