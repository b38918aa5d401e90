"""Scoring requests on a server's side: requests that want the same go through the model together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.scorer import Scorer
from opd_lightning.serving.identity import ServerInfo
from opd_lightning.serving.wire import (
    ScoreAnswer,
    ScoreRequest,
    WireError,
    answer_dtype,
    padded,
    placed,
    spans,
)
from opd_lightning.types import Scores, Want


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A frozen model that answers scoring requests, with the scorer of a teacher in the run's own process.

    Args:
        model: a causal language model in evaluation mode.
        info: what is said of it, and the limits that a request is held to.
        scratch: bytes of logits that may be alive at once.
        layout: how rows go through the backbone.
        tokens: most tokens of one pass, padding included; a row that is longer goes alone.
    """

    model: PreTrainedModel
    info: ServerInfo
    scratch: int
    layout: str
    tokens: int

    def check(self, request: ScoreRequest) -> None:
        """Refuse what this model cannot score.

        Raises:
            WireError: ids beyond the vocabulary, a row beyond the context, or too many ids at a position.
        """
        info, wanted = self.info, request.wanted
        if wanted.vocab > info.vocab:
            raise WireError(f"the vocabulary must be at most {info.vocab} ids, got {wanted.vocab}")
        most = request.given.shape[1] + wanted.top
        if most > info.most_ids or wanted.top > wanted.vocab:
            raise WireError(
                f"at most {min(info.most_ids, wanted.vocab)} ids are scored at a position, got {most}"
            )
        _check_range("ids", request.ids, info.vocab)
        _check_range("given", request.given, wanted.vocab)
        longest = int(request.lengths.max())
        if longest > info.context:
            raise WireError(f"a row may have at most {info.context} tokens, got {longest}")
        # The taken token is scored as well.
        _check_range("ids of responses", request.ids[_response_places(request)], wanted.vocab)

    @torch.no_grad()
    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        """Answer requests with equal keys, all together if their tokens fit, in the order given."""
        joined = _joined(requests)
        whole = {name: torch.zeros(shape, dtype=answer_dtype(name)) for name, shape in joined.shapes.items()}
        for rows in self._pieces(joined) if whole else ():
            places, found = self._scored(joined, rows)
            for name, values in whole.items():
                values[places] = found[name].to(values.dtype)
        counts = [len(request.given) for request in requests]
        cut = {name: values.split(counts) for name, values in whole.items()}
        return [
            ScoreAnswer(model=self.info.model, **{name: pieces[i] for name, pieces in cut.items()})
            for i in range(len(requests))
        ]

    def _scored(
        self, request: ScoreRequest, rows: Int[Tensor, " rows"]
    ) -> tuple[Int[Tensor, " n"], dict[str, Tensor]]:
        """Score some rows in one pass; return which response tokens theirs are among all, and what was said."""
        wanted, columns = request.key
        prompts, responses = request.prompts[rows], request.responses[rows]
        ids = request.ids[spans(_starts(request.lengths)[rows], request.lengths[rows])]
        tokens = padded(ids, prompts, responses).to(self.model.device)
        places = spans(_starts(request.responses)[rows], responses.long())
        given = placed(request.given[places].long(), tokens.mask) if columns else None
        want = Want(
            taken=wanted.taken,
            entropy=wanted.entropy,
            support="exact" if columns else "none",
            top=wanted.top,
        )
        scorer = Scorer(self.model, wanted.vocab, self.scratch, wanted.temperature, self.layout)
        return places, _flat(scorer(tokens, want, given), tokens.mask)

    def _pieces(self, request: ScoreRequest) -> Iterator[Int[Tensor, " rows"]]:
        """Yield the rows of each pass: all in their order if they fit, else those of like length together."""
        rows = torch.nonzero(request.responses > 0).squeeze(-1)
        lengths = request.lengths[rows]
        if not len(rows) or len(rows) * int(lengths.max()) <= self.tokens:
            yield from [rows] * bool(len(rows))
            return
        order = torch.argsort(lengths, stable=True)
        begin, ordered = 0, lengths[order].tolist()
        for end in range(1, len(ordered) + 1):
            if end == len(ordered) or (end + 1 - begin) * ordered[end] > self.tokens:
                yield rows[order[begin:end]].sort().values
                begin = end


def _joined(requests: Sequence[ScoreRequest]) -> ScoreRequest:
    names = ("ids", "prompts", "responses", "given")
    tensors = {name: torch.cat([getattr(request, name) for request in requests]) for name in names}
    return ScoreRequest(**tensors, wanted=requests[0].wanted)


def _response_places(request: ScoreRequest) -> Int[Tensor, " n"]:
    """Return where the response tokens lie among all."""
    return spans(_starts(request.lengths) + request.prompts, request.responses.long())


def _starts(lengths: Tensor) -> Int[Tensor, " rows"]:
    """Return where each row begins."""
    return lengths.cumsum(0) - lengths


def _flat(scores: Scores, mask: Tensor) -> dict[str, Tensor]:
    """Return what was scored at each response token, on the CPU."""
    found = {
        "taken": scores.taken_logp,
        "given": scores.support_logp,
        "entropy": scores.entropy,
        "top_ids": scores.top_ids,
        "top_logp": scores.top_logp,
        "mass": None if scores.top_logp is None else scores.top_logp.exp().sum(-1),
    }
    return {name: values[mask].cpu() for name, values in found.items() if values is not None}


def _check_range(name: str, ids: Tensor, end: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= end):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise WireError(f"{name} must be below {end} and at least 0, got {wrong}")
