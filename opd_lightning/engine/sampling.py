"""From logits to tokens: pure functions that every in-process engine shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional.selection import largest
from opd_lightning.types import Sampling

# A uniform number at or above this would, after rounding, reach past the last token that has any mass.
_BELOW_ONE = 1 - 2**-40

_BLOCK = 512
"""Neighbouring ids whose mass is summed first as one, of a vocabulary much larger than that."""

_FIRST_RANKED = 64
"""Ids that are ranked at first where ``top_p`` alone decides how many have to be."""


def check(sampling: Sampling) -> None:
    """Raise :class:`~opd_lightning.errors.ConfigError` unless every field of ``sampling`` is in its range."""
    s = sampling.checked()
    if s.vocab is not None:
        require(
            s.vocab >= 1, "sampling.vocab", "be at least 1", s.vocab, "leave it out for the whole vocabulary"
        )
        require(s.top_ids <= s.vocab, "sampling.top_ids", f"be at most {s.vocab}", s.top_ids, "lower it")


def row_uniforms(seeds: Sequence[int], n: int) -> Float[Tensor, "batch n"]:
    """Return ``n`` float64 numbers in [0, 1) for each seed, from a stream that depends on that seed alone.

    The first m numbers of a row are the same for every n >= m, so a longer budget changes no token. The
    generator (Mersenne Twister, on the CPU) keeps the low 32 bits of a seed.
    """
    uniform = torch.empty(len(seeds), n, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(uniform, seeds, strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    return uniform


def draw(
    logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"], sampling: Sampling
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Int[Tensor, "batch k"] | None]:
    """Draw one id a row by inverse CDF: the first id whose cumulative probability exceeds ``uniform``.

    Returns the ids, their log-probs under the truncated, renormalised distribution (0 when greedy) and
    the ``sampling.top_ids`` largest ids of the untruncated logits, best first (None when 0). Ids at or
    above ``sampling.vocab`` do not exist here.
    """
    logits = logits[:, : sampling.vocab].float()
    top = largest(logits, sampling.top_ids)[0] if sampling.top_ids else None
    if sampling.temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits)), top
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    ids, logits = kept(logits, sampling)
    mass = (logits - logits.amax(-1, keepdim=True)).exp_()
    places, total = inverse_cdf(mass, uniform)
    places = places.unsqueeze(-1)
    logp = (mass.gather(1, places).double() / total.unsqueeze(-1)).log()
    drawn = places if ids is None else ids.gather(1, places)
    return drawn[:, 0], logp[:, 0].float(), top


def kept(
    logits: Float[Tensor, "batch vocab"], sampling: Sampling
) -> tuple[Int[Tensor, "batch some"] | None, Float[Tensor, "batch some"]]:
    """Return ids in ascending order with their logits, among them all that survive top-k, then top-p, then min-p.

    What does not survive has a logit of -inf. Ids are None where all are there. top-k keeps the k
    largest. top-p keeps the smallest set, largest first, whose mass among those reaches ``top_p``, the
    token that crosses it included. min-p keeps ids at least ``min_p`` times as likely as the likeliest,
    a ratio that renormalising does not change. The likeliest id always survives.
    """
    ids = None
    if sampling.top_k or sampling.top_p < 1:
        ids, logits = _nucleus(logits, sampling)
    if sampling.min_p:
        logits = logits.masked_fill(
            logits < logits.amax(-1, keepdim=True) + math.log(sampling.min_p), -torch.inf
        )
    return ids, logits


def _nucleus(
    logits: Float[Tensor, "batch vocab"], sampling: Sampling
) -> tuple[Int[Tensor, "batch some"] | None, Float[Tensor, "batch some"]]:
    """Rank no more ids of a row than hold ``top_p`` of its mass, found by asking for more where they do not."""
    size = logits.shape[-1]
    most = min(sampling.top_k or size, size)
    if most > size // 8 and size <= 8 * _FIRST_RANKED:
        values, ids = logits.topk(most, dim=-1)
        inside = _inside(values, values.logsumexp(-1, keepdim=True), sampling.top_p)
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, inside)
        return None, logits.masked_fill(~keep, -torch.inf)
    count = sampling.top_k if sampling.top_k else _FIRST_RANKED
    normaliser = None if sampling.top_k else logits.logsumexp(-1, keepdim=True)
    rows, pieces = torch.arange(len(logits), device=logits.device), []
    while True:
        count = min(count, most)
        ids, values = largest(logits[rows], count)
        total = values.logsumexp(-1, keepdim=True) if normaliser is None else normaliser[rows]
        inside = _inside(values, total, sampling.top_p)
        # Where the last one ranked is inside, the next one might be too.
        more = inside[:, -1] if count < most else torch.zeros_like(inside[:, -1])
        ids, order = ids.sort(-1)
        pieces.append(
            (rows[~more], ids[~more], values.masked_fill(~inside, -torch.inf).gather(-1, order)[~more])
        )
        rows, count = rows[more], 8 * count
        if not len(rows):
            return _side_by_side(pieces, len(logits), count // 8)


def _inside(
    values: Float[Tensor, "rows ranked"], normaliser: Float[Tensor, "rows 1"], top_p: float
) -> Bool[Tensor, "rows ranked"]:
    """Return which of the ranked ids top-p keeps: those before which the mass has not yet reached it."""
    if top_p >= 1:
        return torch.ones_like(
            values, dtype=torch.bool
        )  # Sums of rounded probabilities may pass 1 on the way.
    probability = (values - normaliser).exp()
    return probability.cumsum(-1, dtype=torch.float64) - probability < top_p


def _side_by_side(
    pieces: list[tuple[Tensor, Tensor, Tensor]], batch: int, width: int
) -> tuple[Int[Tensor, "batch width"], Float[Tensor, "batch width"]]:
    """Put rows that were ranked to different depths into one table; what is missing has no mass."""
    _, ids, values = pieces[0]
    all_ids, all_values = ids.new_zeros(batch, width), values.new_full((batch, width), -torch.inf)
    for rows, ids, values in pieces:
        all_ids[rows, : ids.shape[1]] = ids
        all_values[rows, : ids.shape[1]] = values
    return all_ids, all_values


def inverse_cdf(
    mass: Float[Tensor, "batch n"], uniform: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the first place whose cumulative share of the mass exceeds ``uniform``, and each row's whole mass.

    Sums along the row are in float64: over 150,000 tokens a float32 sum is off by more than the rarest
    tokens' mass. Of a long row only the block that holds the place is summed one by one.
    """
    target = uniform.double().clamp(max=_BELOW_ONE).unsqueeze(-1)
    n = mass.shape[-1]
    if n <= 4 * _BLOCK:
        places, cdf = _search(mass, target)
        return places[:, 0], cdf[:, -1]
    whole = n - n % _BLOCK
    blocks = mass[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if whole < n:
        blocks = torch.cat([blocks, mass[:, whole:].sum(-1, keepdim=True)], -1)
    block, cdf = _search(blocks, target)
    held = blocks.gather(-1, block).double()
    rest = ((target * cdf[:, -1:] - (cdf.gather(-1, block) - held)) / held).clamp(min=0, max=_BELOW_ONE)
    places = block * _BLOCK + torch.arange(_BLOCK, device=mass.device)
    inside = mass.gather(-1, places.clamp(max=n - 1)).masked_fill(places >= n, 0.0)
    return (block * _BLOCK + _search(inside, rest)[0])[:, 0], cdf[:, -1]


def _search(
    mass: Float[Tensor, "batch n"], target: Float[Tensor, "batch 1"]
) -> tuple[Int[Tensor, "batch 1"], Float[Tensor, "batch n"]]:
    """Return the place where the cumulative mass exceeds that share of it, and the cumulative mass."""
    cdf = mass.cumsum(-1, dtype=torch.float64)
    places = torch.searchsorted(cdf, target * cdf[:, -1:], right=True)
    return places.clamp_(max=mass.shape[-1] - 1), cdf
