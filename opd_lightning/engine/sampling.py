"""From logits to tokens: pure functions that every in-process engine shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.types import Sampling

# A uniform number at or above this would, after rounding, reach past the last token that has any mass.
_BELOW_ONE = 1 - 2**-40


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
    top = logits.topk(sampling.top_ids, dim=-1).indices if sampling.top_ids else None
    if sampling.temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits)), top
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    keep = kept(logits, sampling)
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    probability = logits.softmax(-1)
    # Summed in float64: over 150,000 tokens a float32 sum is off by more than the rarest tokens' mass.
    cdf = probability.cumsum(-1, dtype=torch.float64)
    target = uniform.double().clamp(max=_BELOW_ONE)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True).clamp_(max=logits.shape[-1] - 1)
    logp = (probability.gather(1, ids).double() / cdf[:, -1:]).log()
    return ids[:, 0], logp[:, 0].float(), top


def kept(logits: Float[Tensor, "batch vocab"], sampling: Sampling) -> Bool[Tensor, "batch vocab"] | None:
    """Return which ids survive top-k, then top-p, then min-p; None when none of the three is on.

    top-k keeps the k largest. top-p keeps the smallest set, largest first, whose mass among those reaches
    ``top_p``, the token that crosses it included. min-p keeps ids at least ``min_p`` times as likely as
    the likeliest, a ratio that renormalising does not change. The likeliest id always survives.
    """
    keep = None
    if sampling.top_k or sampling.top_p < 1:
        size = logits.shape[-1]
        values, ids = logits.topk(min(sampling.top_k or size, size), dim=-1)
        inside = torch.ones_like(ids, dtype=torch.bool)
        if sampling.top_p < 1:
            probability = values.softmax(-1)
            inside = probability.cumsum(-1, dtype=torch.float64) - probability < sampling.top_p
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, inside)
    if sampling.min_p:
        near = logits >= logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        keep = near if keep is None else keep & near
    return keep
