"""A teacher behind ``python -m opd_lightning.serve_teacher``, on this machine or another."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.errors import ConfigError, require
from opd_lightning.loading import Limits, Loading
from opd_lightning.protocols import Scoring
from opd_lightning.schedule import within
from opd_lightning.serving.client import Connection, read_token
from opd_lightning.serving.identity import ServerInfo
from opd_lightning.serving.wire import (
    KIND,
    VERSION,
    ScoreAnswer,
    ScoreRequest,
    Wanted,
    WireError,
    scores_of,
)
from opd_lightning.teacher.cached import cached
from opd_lightning.types import Scores, TokenBatch, Want

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedTeacher:
    """Names a scoring server. It says log-probs at given ids, so that every support but the full one works.

    Args:
        address: ``http://host:port`` as the server prints it.
        token_env: the environment variable that holds the server's token; unset for none. The token itself
            is no setting: settings are saved and logged.
        timeout_s: for the answer to one request, in seconds.
        patience_s: how long a server that is gone is waited for, in seconds.
        tokens_per_request: most tokens of a request, prompts included; a longer row goes alone.
        scoring_temperature: None for the student's, which each request carries.
        cache: folder of a cache of its scores; see :class:`~opd_lightning.teacher.cached.CachedScorer`.

    Raises:
        ConfigError: a field out of its range.
    """

    address: str
    token_env: str
    timeout_s: float
    patience_s: float
    tokens_per_request: int
    scoring_temperature: float | None = None
    cache: str | None = None

    gives_hidden = False
    """Hidden states are not sent."""

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.address)
            holds = url.scheme in ("http", "https") and bool(url.host) and not url.userinfo and not url.query
        except (TypeError, httpx2.InvalidURL):
            holds = False
        remedy = "use the address that the server prints"
        require(holds, "teacher.address", "be like http://127.0.0.1:8765", self.address, remedy)
        for name, least in (("timeout_s", 1e-3), ("patience_s", 0.0)):
            value = getattr(self, name)
            require(within(value, least, 1e9), f"teacher.{name}", "be a number of seconds", value, "use 300")
        tokens = self.tokens_per_request
        whole = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1
        require(whole, "teacher.tokens_per_request", "be at least 1", tokens, "use 32768")

    @property
    def path(self) -> str:
        """Where the teacher lies."""
        return self.address

    @property
    def dtype(self) -> str:
        """Of the log-probs that come; the weights have the server's."""
        return "float32"

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

    def shared_vocabulary(self, tokenizer: PreTrainedTokenizerBase, width: int) -> int:
        """Return how many ids the teacher shares with a student of this tokenizer and width of logits.

        Raises:
            ConfigError: the server is gone or another one, or ids mean other tokens to it.
        """
        info = self._info(self.connection)
        info.tokenizer.check(tokenizer, "teacher.address")
        return min(width, info.vocab)

    def limits(self) -> Limits:
        """Return what the server takes.

        Raises:
            ConfigError: it is gone or another one.
        """
        info = self._info(self.connection)
        return Limits(tokens=info.context, ids=info.most_ids)

    def load(self, loading: Loading) -> Scoring:
        """Return the teacher, after a check that its log-probs belong to the tokens that they are asked for.

        Raises:
            ConfigError: the server is gone or another one, or what it says is misaligned.
        """
        loading.check_temperature(self.scoring_temperature, "teacher.scoring_temperature")
        connection = self.connection
        scorer = ServedScorer(
            connection=connection,
            info=self._info(connection),
            vocab=loading.vocab,
            temperature=loading.temperature,
            tokens=self.tokens_per_request,
        )
        check_alignment(scorer, loading.tokenizer)
        return cached(scorer, self.cache, scorer.info.model, loading)

    def _info(self, connection: Connection) -> ServerInfo:
        response = connection.get("/info")
        _check_status(response, connection, self.token_env)
        try:
            words = response.json()
            version = words["version"]
            info = ServerInfo.read(words) if version == VERSION else None
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(
                f"`teacher.address` must name a server of opd_lightning.serve_teacher, got {self.address}, which is "
                "another one; use the address that serve_teacher prints"
            ) from error
        remedy = "use the same release of opd_lightning on both sides"
        require(info is not None, "teacher.address", f"speak version {VERSION}", version, remedy)
        assert info is not None
        return info


@dataclass(frozen=True, kw_only=True)
class ServedScorer:
    """Asks a server for scores; see :class:`~opd_lightning.scorer.Scorer` for what they are.

    An answer that comes from other weights than the first one did is refused: a server that was started again
    with another model would change the run without a word.

    Args:
        connection: to the server.
        info: what it said of itself at the start.
        vocab: ids that both models know.
        temperature: scoring temperature.
        tokens: most tokens of a request, prompts included.
    """

    connection: Connection
    info: ServerInfo
    vocab: int
    temperature: float
    tokens: int

    kind = "served"
    """For people."""

    @torch.no_grad()
    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Score the tokens, in requests of at most ``tokens`` tokens; the scores are where the tokens are.

        Raises:
            ConfigError: hidden states are wanted; a row is longer than the teacher's context; the server has
                refused, is gone, or is another one than at the start.
        """
        if want.hidden or want.full:
            raise ConfigError(
                f"`support` must not be full with the teacher at {self.connection.address}, which sends no hidden "
                "states; use support=teacher, or a teacher in this process"
            )
        given = support_ids if want.support != "none" else None
        wanted = Wanted.of(want, self.vocab, self.temperature)
        answers = []
        for rows in self._requests(tokens):
            part = None if given is None else given[rows]
            answers.append(self._ask(ScoreRequest.of(tokens.rows(rows), part, wanted)))
        return scores_of(answers, tokens.mask, want)

    def _requests(self, tokens: TokenBatch) -> Iterator[slice]:
        """Yield the rows of each request, in their order."""
        lengths = (tokens.prompt_mask.sum(-1) + tokens.mask.sum(-1)).tolist()
        longest = max(lengths)
        require(
            longest <= self.info.context,
            "teacher.address",
            f"name a teacher with a context of at least {longest} tokens, the longest prompt with its response",
            self.info.context,
            "lower rollout.max_new_tokens or collector.max_prompt_tokens, or raise the server's `context`",
        )
        begin, size = 0, 0
        for row, length in enumerate(lengths):
            if size and size + length > self.tokens:
                yield slice(begin, row)
                begin, size = row, 0
            size += length
        yield slice(begin, len(lengths))

    def _ask(self, request: ScoreRequest) -> ScoreAnswer:
        response = self.connection.post("/score", request.write(), KIND)
        _check_status(response, self.connection, None)
        try:
            answer = ScoreAnswer.read(response.content, request)
        except WireError as error:
            raise ConfigError(
                f"`teacher.address` must name a server of opd_lightning.serve_teacher, got an answer of another kind "
                f"from {self.connection.address} ({error}); check what listens there"
            ) from error
        require(
            answer.model == self.info.model,
            "teacher.address",
            f"keep its teacher during a run, {self.info.path} with weights {self.info.model}",
            answer.model,
            "start the server with the first teacher again, or a new run with this one",
        )
        return answer


def _check_status(response: httpx2.Response, connection: Connection, token_env: str | None) -> None:
    """Refuse what the server has refused, in its own words.

    Raises:
        ConfigError: the answer is none.
    """
    if response.status_code == 200:
        return
    said = " ".join(response.text.split())[:200]
    remedies = {
        401: f"set {token_env or 'teacher.token_env'} to the server's token",
        404: "use the address that serve_teacher prints",
        413: "lower teacher.tokens_per_request, or raise the server's max_body_mb",
    }
    remedy = remedies.get(response.status_code, "see the server's own output")
    raise ConfigError(
        f"`teacher.address` must name a server that accepts these requests, got status {response.status_code} from "
        f"{connection.address} ({said}); {remedy}"
    )


_TOLERANCE = 0.05
"""Nats between two layouts of the same tokens: rounding of bfloat16 weights stays below, another position does not."""


def check_alignment(scorer: ServedScorer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose log-probs are not those of the token at their own position.

    Four rows are scored at the same given ids: one text cut into prompt and response at two places, and the
    text with another last token, and with another last but one. The log-probs for the last place must be
    the same in the first three, since no token is seen before it is predicted, and another in the fourth.

    Raises:
        ConfigError: they are not.
    """
    ids = tokenizer("What is 12 plus 30? It is 42.", add_special_tokens=False)["input_ids"]
    text = [i for i in ids if i < scorer.vocab][:12]
    other = next(i for i in text if i not in text[-2:])
    rows = [text, text, [*text[:-1], other], [*text[:-2], other, text[-1]]]
    prompts = [3, 6, 3, 3]
    width = len(text)
    place = torch.arange(width)
    tokens = TokenBatch(
        prompt_ids=torch.tensor([[0] * (6 - p) + row[:p] for p, row in zip(prompts, rows, strict=True)]),
        prompt_mask=torch.arange(6) >= 6 - torch.tensor(prompts).unsqueeze(-1),
        ids=torch.tensor([row[p:] + [0] * (p - 3) for p, row in zip(prompts, rows, strict=True)]),
        mask=place[: width - 3] < width - torch.tensor(prompts).unsqueeze(-1),
    )
    asked = torch.tensor(sorted(set(text))).expand(*tokens.ids.shape, -1)
    scores = scorer(tokens, Want(taken=True, support="exact"), asked)
    assert scores.support_logp is not None
    assert scores.taken_logp is not None
    one, cut, last, before = scores.support_logp
    gaps = {
        "cut elsewhere": (one[3:] - cut[:-3]).abs().max(),
        "seen too early": (one - last).abs().max(),
        "not its own": (scores.taken_logp[0] - one.gather(-1, _found(asked[0], tokens.ids[0]))[:, 0])
        .abs()
        .max(),
    }
    wrong = [name for name, gap in gaps.items() if not gap <= _TOLERANCE]
    if torch.equal(one[-1], before[-1]):
        wrong.append("blind to the token before it")
    require(
        not wrong,
        "teacher.address",
        "give each token the log-prob at its own position",
        ", ".join(wrong),
        "use the same release of opd_lightning on both sides",
    )


def _found(among: Int[Tensor, "time k"], ids: Int[Tensor, " time"]) -> Int[Tensor, "time 1"]:
    """Return the column of each id."""
    return (among == ids.unsqueeze(-1)).to(torch.uint8).argmax(-1, keepdim=True)
