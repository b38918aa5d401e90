"""The language-model head, never all at once: log-probs at asked ids without ``[n vocab]`` tensors.

Hidden states ``[n hidden]`` and a :class:`Head` go in, ``[n k]`` comes out, in three modes:

- :func:`support_logits` touches only the k rows of the head that are asked for: enough for a divergence
  renormalised on a support, which needs no normaliser over the vocabulary;
- :func:`exact` (and :func:`top`, without gradient) give log-probs under the full softmax;
- :func:`full` gives a divergence over the whole vocabulary.

The last three walk over chunks of positions and compute each chunk's logits again in the backward pass,
so that one chunk of logits is alive at a time. Matrix products run in the head's own precision, all
that follows (normaliser, entropy, divergence) in float32, or float64 for a float64 head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_ELEMENTS = 1 << 26
"""Largest ``[block k hidden]`` that :func:`support_logits` gathers: 256 MB in float32."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What turns hidden states into logits: cap(scale * (W h + b)) / temperature.

    cap(x) = softcap * tanh(x / softcap). A tied head passes the embedding's weight; a slice of the weight
    is a head over fewer ids. ``temperature`` is the scoring temperature tau: S = softmax(z / tau).
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0

    @property
    def vocab(self) -> int:
        """Number of ids."""
        return self.weight.shape[0]

    def detach(self) -> Head:
        """Return the same head without gradient."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def logits(self, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n vocab"]:
        """Return the logits of every id; for a chunk of positions at most."""
        raw = _upcast(F.linear(hidden.to(self.weight.dtype), self.weight))
        return self.finish(raw if self.bias is None else raw + self.bias)

    def finish(self, raw: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return scaled, capped and tempered logits."""
        if self.scale != 1.0:
            raw = raw * self.scale
        capped = raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)
        return capped if self.temperature == 1.0 else capped / self.temperature


class Exact(NamedTuple):
    """Log-probs at the asked ids and, where asked, the entropy of the full distribution, nats."""

    logp: Float[Tensor, "n k"]
    entropy: Float[Tensor, " n"] | None


class Top(NamedTuple):
    """The most likely ids with their log-probs, log-probs at the asked ids, and the entropy, nats."""

    ids: Int[Tensor, "n top"]
    logp: Float[Tensor, "n top"]
    asked_logp: Float[Tensor, "n k"]
    entropy: Float[Tensor, " n"] | None


def support_logits(
    hidden: Float[Tensor, "n hidden"],
    head: Head,
    ids: Int[Tensor, "n k"],
    *,
    max_elements: int = MAX_ELEMENTS,
) -> Float[Tensor, "n k"]:
    """Return the logits (not log-probs) of ``ids``, from k rows of the head at each position.

    Gradient flows into the hidden states, the weight and the bias. Positions are taken in blocks, such
    that no gathered ``[block k hidden]`` exceeds ``max_elements``, in the backward pass either.
    """
    block = max(1, max_elements // max(1, ids.shape[1] * hidden.shape[1]))
    raw = _GatheredLogits.apply(hidden.to(head.weight.dtype), head.weight, ids, block)
    return head.finish(raw if head.bias is None else raw + head.bias[ids])


def exact(
    hidden: Float[Tensor, "n hidden"], head: Head, ids: Int[Tensor, "n k"], *, entropy: bool, chunk: int
) -> Exact:
    """Return log-probs of ``ids`` under the full softmax, ``chunk`` positions at a time.

    log p(v) = z_v - logsumexp(z),    H = logsumexp(z) - sum_v p(v) z_v
    """

    def scored(hidden: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits = head.logits(hidden)
        logp, normaliser = _gather_logp(logits, ids)
        return (logp, _entropy(logits, normaliser)) if entropy else (logp,)

    logp, *rest = _in_chunks(scored, hidden, ids, chunk=chunk)
    return Exact(logp, rest[0] if entropy else None)


@torch.no_grad()
def top(
    hidden: Float[Tensor, "n hidden"],
    head: Head,
    k: int,
    ids: Int[Tensor, "n k"],
    *,
    entropy: bool,
    chunk: int,
) -> Top:
    """Return the ``k`` most likely ids and what :func:`exact` returns, in one pass, without gradient.

    ``ids`` may have no columns. Among equal logits the order is the backend's.

    Raises:
        ValueError: if ``k`` exceeds the vocabulary.
    """
    if not 0 <= k <= head.vocab:
        raise ValueError(f"k must be between 0 and the vocabulary of {head.vocab}, got {k}")

    def scored(hidden: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits = head.logits(hidden)
        logp, normaliser = _gather_logp(logits, ids)
        best = logits.topk(k, dim=-1)
        found = (best.indices, best.values - normaliser.unsqueeze(-1), logp)
        return (*found, _entropy(logits, normaliser)) if entropy else found

    top_ids, top_logp, logp, *rest = _in_chunks(scored, hidden, ids, chunk=chunk)
    return Top(top_ids, top_logp, logp, rest[0] if entropy else None)


def full(
    student_hidden: Float[Tensor, "n hidden"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "n width"],
    teacher_head: Head,
    divergence: Callable[[Tensor, Tensor], Tensor],
    chunk: int,
) -> Float[Tensor, " n"]:
    """Return ``divergence(student_logp, teacher_logp)`` over the whole vocabulary at every position.

    Gradient flows into the student's hidden states and head only.

    Raises:
        ValueError: if the two heads have different vocabularies.
    """
    if student_head.vocab != teacher_head.vocab:
        raise ValueError(
            f"student and teacher heads must cover the same ids, got {student_head.vocab} and "
            f"{teacher_head.vocab}; cut both to the shared vocabulary"
        )
    teacher_head = teacher_head.detach()

    def compared(student_hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor]:
        teacher_logp = teacher_head.logits(teacher_hidden).log_softmax(-1)
        student_logp = student_head.logits(student_hidden).log_softmax(-1)
        return (divergence(student_logp, teacher_logp),)

    return _in_chunks(compared, student_hidden, teacher_hidden.detach(), chunk=chunk)[0]


def _in_chunks(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor, chunk: int) -> list[Tensor]:
    """Apply ``function`` to ``chunk`` rows at a time, keeping nothing of it for the backward pass."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    # No rows still make one (empty) chunk: its result has the right shape, dtype and graph.
    starts = range(0, max(rows[0].shape[0], 1), chunk)
    pieces = [
        checkpoint(function, *(r[i : i + chunk] for r in rows), use_reentrant=False, preserve_rng_state=False)
        for i in starts
    ]
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def _gather_logp(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    normaliser = logits.logsumexp(-1)
    return logits.gather(-1, ids) - normaliser.unsqueeze(-1), normaliser


def _entropy(logits: Tensor, normaliser: Tensor) -> Tensor:
    return normaliser - (logits.softmax(-1) * logits).sum(-1)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _upcast(x: Tensor) -> Tensor:
    return x.to(_at_least_float32(x))


class _GatheredLogits(torch.autograd.Function):
    """The product of each position's hidden state with the gathered rows of the head.

    Written out because autograd would keep every gathered block for the backward pass, and would fill
    one dense gradient of the weight for each block instead of one for all.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        ctx.block = block
        out = torch.empty(ids.shape, dtype=_at_least_float32(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, ids.shape[0], block):
                rows = _upcast(weight[ids[i : i + block]])
                out[i : i + block] = torch.einsum("nkh,nh->nk", rows, _upcast(hidden[i : i + block]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        into_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # The rows of frequent ids collect thousands of terms: summed in float32, rounded once.
        wide = _at_least_float32(weight)
        into_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for i in range(0, ids.shape[0], ctx.block):
                part = slice(i, i + ctx.block)
                if into_hidden is not None:
                    rows = _upcast(weight[ids[part]])
                    into_hidden[part] = torch.einsum("nk,nkh->nh", grad[part], rows).to(hidden.dtype)
                if into_weight is not None:
                    outer = grad[part].unsqueeze(-1) * _upcast(hidden[part]).unsqueeze(1)
                    into_weight.index_add_(0, ids[part].flatten(), outer.flatten(0, 1))
        return into_hidden, None if into_weight is None else into_weight.to(weight.dtype), None, None
