"""What goes over the wire: a scoring request and its answer, as safetensors.

Everything is flat, without padding. ``total`` counts the tokens of all rows, ``n`` those of their responses,
each in the order of the rows. An id with its log-prob costs 8 bytes: an int32 and a float32.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from opd_lightning.types import Scores, TokenBatch, Want

VERSION = "1"
"""Of the format; the other side's must be the same."""

KIND = "application/vnd.opd-lightning.scores"
"""Media type of both payloads."""

_DTYPES = {"I32": torch.int32, "F32": torch.float32}


class WireError(ValueError):
    """A payload that is none of ours; one sentence says why."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked at every response position; requests that want the same can be scored together.

    Args:
        vocab: ids that both models know; probabilities are over these alone.
        temperature: the scoring temperature tau of softmax(z / tau).
        taken: log-prob of the response token.
        entropy: of the full distribution, nats.
        top: so many of the model's own top ids with their log-probs.
        mass: the probability of those top ids together.
    """

    vocab: int
    temperature: float = 1.0
    taken: bool = False
    entropy: bool = False
    top: int = 0
    mass: bool = False

    @classmethod
    def of(cls, want: Want, vocab: int, temperature: float) -> Wanted:
        """Return what a scorer is asked for but for given ids, which come with the request."""
        return cls(vocab=vocab, temperature=temperature, taken=want.taken, entropy=want.entropy, top=want.top)

    @classmethod
    def read(cls, words: Mapping[str, str]) -> Wanted:
        """Return what the words of a header say.

        Raises:
            WireError: one is missing or no number in its range.
        """
        try:
            vocab, top, *flags = (_count(words[n]) for n in ("vocab", "top", "taken", "entropy", "mass"))
            temperature = float(words["temperature"])
        except (KeyError, ValueError) as error:
            raise WireError(f"the header must give what is wanted, got {_cut(error)}") from None
        if not (vocab >= 1 and 0 < temperature < math.inf):
            raise WireError("the header must give a vocabulary and a temperature above 0")
        taken, entropy, mass = map(bool, flags)
        if mass and not top:
            raise WireError("mass is that of the top ids, and none are asked for")
        return cls(vocab=vocab, temperature=temperature, taken=taken, entropy=entropy, top=top, mass=mass)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreRequest:
    """Rows to score.

    ``ids`` holds each row's prompt and then its response; ``given`` the ids to be scored at each response
    token, ``k = 0`` for none.
    """

    ids: Int[Tensor, " total"]
    prompts: Int[Tensor, " rows"]
    responses: Int[Tensor, " rows"]
    given: Int[Tensor, "n k"]
    wanted: Wanted

    @classmethod
    def of(
        cls, tokens: TokenBatch, given: Int[Tensor, "batch time k"] | None, wanted: Wanted
    ) -> ScoreRequest:
        """Return the request for a batch, its padding left out."""
        exists = torch.cat([tokens.prompt_mask, tokens.mask], -1)
        ids = torch.cat([tokens.prompt_ids, tokens.ids], -1)[exists]
        none = tokens.ids.new_zeros((int(tokens.mask.sum()), 0))
        return cls(
            ids=_narrow(ids),
            prompts=_narrow(tokens.prompt_mask.sum(-1)),
            responses=_narrow(tokens.mask.sum(-1)),
            given=_narrow(none if given is None else given[tokens.mask]),
            wanted=wanted,
        )

    @property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Tokens of each row."""
        return self.prompts.long() + self.responses.long()

    @property
    def key(self) -> tuple[Wanted, int]:
        """Equal for requests that one pass can serve."""
        return self.wanted, self.given.shape[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each part of the answer."""
        wanted, n, k = self.wanted, *self.given.shape
        flat = {"taken": wanted.taken, "entropy": wanted.entropy, "mass": wanted.mass}
        wide = {"given": k, "top_ids": wanted.top, "top_logp": wanted.top}
        shapes: dict[str, tuple[int, ...]] = {name: (n,) for name, asked in flat.items() if asked}
        return shapes | {name: (n, width) for name, width in wide.items() if width}

    @property
    def answer_bytes(self) -> int:
        """The size of the answer's numbers."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())

    def write(self) -> bytes:
        """Return the payload."""
        tensors = {name: getattr(self, name) for name in ("ids", "prompts", "responses", "given")}
        words = {name: str(int(v) if isinstance(v, bool) else v) for name, v in asdict(self.wanted).items()}
        return _write(tensors, words)

    @classmethod
    def read(cls, body: bytes) -> ScoreRequest:
        """Return what a payload asks; ranges that depend on the model are not looked at.

        Raises:
            WireError: it is no request of this version, or its parts do not fit together.
        """
        tensors, words = _read(body, {"ids": 1, "prompts": 1, "responses": 1, "given": 2}, torch.int32)
        request = cls(**tensors, wanted=Wanted.read(words))
        if not len(request.prompts) or len(request.prompts) != len(request.responses):
            raise WireError("prompts and responses must give a length for each row, of one row or more")
        if bool((request.prompts < 1).any()) or bool((request.responses < 0).any()):
            raise WireError(
                "each row must have a prompt of one token or more, and a response of none or more"
            )
        if int(request.lengths.sum()) != len(request.ids):
            raise WireError("ids must hold as many tokens as the lengths say")
        if int(request.responses.sum(dtype=torch.long)) != len(request.given):
            raise WireError("given must have a row for each response token")
        return request


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreAnswer:
    """What was asked, at every response token; None for what was not. ``model`` names the weights that say it."""

    model: str
    taken: Float[Tensor, " n"] | None = None
    given: Float[Tensor, "n k"] | None = None
    entropy: Float[Tensor, " n"] | None = None
    top_ids: Int[Tensor, "n top"] | None = None
    top_logp: Float[Tensor, "n top"] | None = None
    mass: Float[Tensor, " n"] | None = None

    def write(self) -> bytes:
        """Return the payload."""
        every = {name: getattr(self, name) for name in _ANSWERS}
        tensors = {name: value for name, value in every.items() if value is not None}
        return _write(tensors, {"model": self.model})

    @classmethod
    def read(cls, body: bytes, request: ScoreRequest) -> ScoreAnswer:
        """Return the answer to ``request``.

        Raises:
            WireError: it is no answer of this version, or not to this request.
        """
        tensors, words = _read(body, {name: len(shape) for name, shape in request.shapes.items()})
        for name, shape in request.shapes.items():
            found = tensors[name]
            if found.shape != shape or found.dtype != answer_dtype(name):
                raise WireError(
                    f"{name} must be {list(shape)} of {answer_dtype(name)}, got {list(found.shape)} of {found.dtype}"
                )
        return cls(model=words.get("model", ""), **tensors)


def answer_dtype(name: str) -> torch.dtype:
    """Return the type of a part of an answer."""
    return torch.int32 if name == "top_ids" else torch.float32


_ANSWERS = ("taken", "given", "entropy", "top_ids", "top_logp", "mass")


def spans(starts: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"]) -> Int[Tensor, " total"]:
    """Return ``starts[r] .. starts[r] + lengths[r] - 1`` of every row, one after another.

    >>> spans(torch.tensor([5, 0]), torch.tensor([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)


def padded(
    ids: Int[Tensor, " total"], prompts: Int[Tensor, " rows"], responses: Int[Tensor, " rows"]
) -> TokenBatch:
    """Return flat rows as a batch, prompts padded on the left and responses on the right."""
    before, after = int(prompts.max()), int(responses.max())
    prompt_mask = torch.arange(before) >= before - prompts.unsqueeze(-1)
    mask = torch.arange(after) < responses.unsqueeze(-1)
    exists = torch.cat([prompt_mask, mask], -1)
    both = torch.zeros(exists.shape, dtype=torch.long)
    both[exists] = ids.long()
    return TokenBatch(prompt_ids=both[:, :before], prompt_mask=prompt_mask, ids=both[:, before:], mask=mask)


def placed(values: Tensor, mask: Bool[Tensor, "batch time"]) -> Tensor:
    """Put ``values [n ...]`` at the True places of ``mask``, zeros elsewhere, on the mask's device."""
    out = torch.zeros((*mask.shape, *values.shape[1:]), dtype=values.dtype, device=mask.device)
    out[mask] = values.to(mask.device)
    return out


def scores_of(answers: Sequence[ScoreAnswer], mask: Bool[Tensor, "batch time"], want: Want) -> Scores:
    """Return answers to consecutive rows as what a scorer says of the batch, on the mask's device."""

    def whole(name: str) -> Tensor | None:
        parts = [getattr(answer, name) for answer in answers]
        return None if parts[0] is None else placed(torch.cat(parts), mask)

    top_ids, support = whole("top_ids"), whole("given")
    # As a scorer does: whatever needs the true normaliser makes all log-probs exact.
    alone = not (want.taken or want.entropy or want.top)
    if want.support == "renormalised" and alone and support is not None:
        support = torch.log_softmax(support, -1) * mask.unsqueeze(-1)
    return Scores(
        taken_logp=whole("taken"),
        support_logp=support,
        entropy=whole("entropy"),
        top_ids=None if top_ids is None else top_ids.long(),
        top_logp=whole("top_logp"),
    )


def answer_of(scores: Scores, mask: Bool[Tensor, "batch time"], model: str) -> ScoreAnswer:
    """Return what a scorer said of a batch as an answer."""
    found = {
        "taken": scores.taken_logp,
        "given": scores.support_logp,
        "entropy": scores.entropy,
        "top_ids": scores.top_ids,
        "top_logp": scores.top_logp,
    }
    flat = {name: v[mask].to("cpu", answer_dtype(name)) for name, v in found.items() if v is not None}
    return ScoreAnswer(model=model, **flat)


def _write(tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> bytes:
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    return save(whole, metadata={"version": VERSION, **words})


def _read(
    body: bytes, dims: Mapping[str, int], dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of these names and numbers of axes, and the words beside them."""
    try:
        parts = dict(deserialize(body))
        (size,) = struct.unpack_from("<Q", body)
        words: dict[str, str] = json.loads(body[8 : 8 + size]).get("__metadata__") or {}
    except (SafetensorError, ValueError, struct.error) as error:
        raise WireError(f"the body must be safetensors, got {_cut(error)}") from None
    if words.get("version") != VERSION:
        raise WireError(f"the format's version must be {VERSION}, got {str(words.get('version'))[:20]!r}")
    if parts.keys() != dims.keys():
        raise WireError(
            f"the tensors must be {', '.join(sorted(dims)) or 'none'}, got {_cut(', '.join(sorted(parts)))}"
        )
    tensors = {name: _tensor(name, part, dims[name], dtype) for name, part in parts.items()}
    return tensors, words


def _tensor(name: str, part: Mapping[str, object], axes: int, dtype: torch.dtype | None) -> Tensor:
    kind, shape, data = _DTYPES.get(str(part["dtype"])), part["shape"], part["data"]
    assert isinstance(shape, list)
    assert isinstance(data, bytearray)
    if kind is None or len(shape) != axes or dtype not in (None, kind):
        raise WireError(
            f"{name} must have {axes} axes of int32 or float32, got {len(shape)} of {part['dtype']}"
        )
    # frombuffer refuses a buffer of no bytes.
    flat = torch.frombuffer(data, dtype=kind) if data else torch.zeros(0, dtype=kind)
    return flat.reshape(shape)


def _narrow(ids: Tensor) -> Tensor:
    return ids.to("cpu", torch.int32)


def _count(word: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", word):
        raise ValueError(f"{word[:20]!r} for a count")
    return int(word)


def _cut(text: object) -> str:
    """Return the beginning of a text, as one line."""
    return " ".join(str(text).split())[:120]
