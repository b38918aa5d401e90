"""A teacher behind any vLLM server: its own top ids, read from the log-probs that it gives of a prompt.

On a GPU, where the server is started for it, ids that the student chose as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.loading import Limits, Loading
from opd_lightning.schedule import within
from opd_lightning.serving.client import Connection, read_token
from opd_lightning.teacher._vllm import (
    Entry,
    GivenIds,
    check_alignment,
    most_ranked,
    refusal,
    said_of_prompts,
    served,
)
from opd_lightning.types import Scores, TokenBatch, Want

_IN_FLIGHT = 4
"""Requests at once: a server batches them, and their JSON is read meanwhile."""


@dataclass(frozen=True, kw_only=True)
class VllmTeacher:
    """Names an OpenAI-compatible vLLM server, which gives its own top ids and the taken token; others if asked to.

    Log-probs are at temperature 1 over the whole width of the teacher's head, padding included.

    Args:
        address: ``http://host:port``.
        path: folder or hub name of the same model, of which only configuration and tokenizer are read.
        token_env: the environment variable that holds the server's API key; unset for none.
        timeout_s: for the answer to one request, in seconds.
        patience_s: how long a server that is gone is waited for, in seconds.
        tokens_per_request: most tokens of a request, prompts included; a longer row goes alone.
        scoring_temperature: None for the student's, which must be 1.
        given_ids: have ids scored that the student chose, which vLLM does on a GPU with ``--enable-scale-out``;
            it is tried at the start.

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
    given_ids: bool = False

    gives_hidden = False
    """Hidden states are not sent."""
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
        known = isinstance(self.given_ids, bool)
        require(known, "teacher.given_ids", "be true or false", self.given_ids, "use false")

    @property
    def scores_given_ids(self) -> bool:
        """Whether it scores others than the taken token and its own top ids."""
        return self.given_ids

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
        connection = self.connection
        model, context = served(connection)
        return Limits(tokens=context - 1, ids=most_ranked(connection, model), flag="--max-logprobs ")

    def load(self, loading: Loading) -> VllmScorer:
        """Return the teacher, after a check that its log-probs belong to the tokens that they are asked for.

        Raises:
            ConfigError: another temperature than 1; the server is gone, or what it says is misaligned.
        """
        loading.check_temperature(self.scoring_temperature, "teacher.scoring_temperature")
        self.check_temperature(loading.temperature)
        connection = self.connection
        model, context = served(connection)
        scorer = VllmScorer(
            connection=connection,
            model=model,
            context=context,
            vocab=loading.vocab,
            tokens=self.tokens_per_request,
            given=GivenIds(connection) if self.given_ids else None,
        )
        check_alignment(scorer.entries, loading, scorer.given)
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
        given: scores ids that the student chose; None without.
    """

    connection: Connection
    model: str
    context: int
    vocab: int
    tokens: int
    given: GivenIds | None = None

    @property
    def scores_given_ids(self) -> bool:
        """Whether it scores others than the taken token and its own top ids."""
        return self.given is not None

    gives_entropy = False
    """A few log-probs do not tell it."""

    @torch.no_grad()
    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Return the taken tokens' and the top ids' log-probs; entropy is None, which a few numbers do not tell.

        Raises:
            ConfigError: ids are given that are not the taken ones, without ``given``; hidden states are wanted;
                a row is longer than the teacher's context; the server refuses, or is gone.
        """
        taken = support_ids is None or torch.equal(support_ids, tokens.ids.unsqueeze(-1))
        if want.hidden or want.full or not (taken or self.given):
            raise ConfigError(
                f"`support` must be the teacher's own top ids with the vLLM server at {self.connection.address}, got "
                "ids or states that it does not give; use support=teacher, teacher=served, or for ids on a GPU "
                "teacher.given_ids=true"
            )
        rows = [
            prompt[keep].tolist() + ids[mask].tolist()
            for prompt, keep, ids, mask in zip(
                tokens.prompt_ids, tokens.prompt_mask, tokens.ids, tokens.mask, strict=True
            )
        ]
        if taken or support_ids is None or self.given is None:
            taken_logp, top_ids, top_logp = self._ranked(rows, tokens, want.top)
            support = taken_logp.unsqueeze(-1)
        else:
            support = self.given(rows, support_ids, tokens.mask)
            # Where the taken token is the first of the given ids, as the collector has it, all is said.
            known = not want.top and torch.equal(support_ids[..., 0], tokens.ids)
            taken_logp, top_ids, top_logp = (
                (support[..., 0], None, None) if known else self._ranked(rows, tokens, want.top)
            )
        device = tokens.ids.device
        return Scores(
            taken_logp=taken_logp.to(device),
            support_logp=None if want.support == "none" else support.to(device),
            top_ids=None if top_ids is None else top_ids.to(device),
            top_logp=None if top_logp is None else top_logp.to(device),
        )

    def _ranked(
        self, rows: Sequence[Sequence[int]], tokens: TokenBatch, top: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the log-probs of the taken tokens, and the likeliest ids with theirs, None for ``top=0``."""
        entries = self.entries(rows, top)
        taken_logp = torch.zeros(tokens.ids.shape)
        top_ids = torch.zeros(*tokens.ids.shape, top, dtype=torch.long)
        top_logp = torch.zeros(top_ids.shape)
        for row, length in enumerate(tokens.mask.sum(-1).tolist()):
            if not length:
                continue
            text = rows[row][-length:]
            said: list[Entry] = [entry or {} for entry in entries[row][-length:]]
            taken_logp[row, :length] = torch.tensor(
                [entry[str(i)]["logprob"] for i, entry in zip(text, said, strict=True)]
            )
            if top:
                best = [self._best(entry, top) for entry in said]
                top_ids[row, :length] = torch.tensor([[i for i, _ in pairs] for pairs in best])
                top_logp[row, :length] = torch.tensor([[logp for _, logp in pairs] for pairs in best])
        return taken_logp, top_ids if top else None, top_logp if top else None

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
            raise refusal(self.connection, response.status_code, response.text, top)
        answer = said_of_prompts(self.connection, response)
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
