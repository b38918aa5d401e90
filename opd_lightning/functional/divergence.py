"""Divergences between a student S and a teacher T on the same categories, from log-probabilities.

Every function takes log-probs, reduces the last axis only, in nats, and differentiates into whichever
argument asks for it. ``valid`` marks the categories that exist: what stands at the others, infinities
and NaNs included, changes neither value nor gradient. The arithmetic is at least float32.

Also here: the three ways to read log-probs on a support, a set of ids that need not hold all the mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_ZERO = -1e4
"""Stands for log 0. exp(-1e4) is exactly 0 in float64, and 0 * (a - LOG_ZERO) is 0, not NaN."""

TAIL_LIMIT = -1e-7
"""Largest log-mass of a support beside its tail bucket; the tail then holds at least 1e-7."""

Direction = Literal["reverse", "forward"]
Form = Literal["renormalised", "tail", "plain"]


def reverse_kl(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return KL(S||T) = sum_v S(v) (log S(v) - log T(v)).

    A category with S = 0 contributes 0. T = 0 where S > 0 is infinite on paper; here log 0 counts as
    ``LOG_ZERO``, so that the value is large and the gradient finite.
    """
    student, teacher = _read(student_logp, teacher_logp, valid)
    return _kl(student, teacher)


def forward_kl(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return KL(T||S) = sum_v T(v) (log T(v) - log S(v)); zeros as in :func:`reverse_kl`."""
    student, teacher = _read(student_logp, teacher_logp, valid)
    return _kl(teacher, student)


def jsd(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"] | None = None,
    *,
    beta: float,
    scaled: bool = False,
) -> Float[Tensor, "*batch"]:
    """Return JSD_beta = beta KL(T||M) + (1 - beta) KL(S||M) with M = beta T + (1 - beta) S.

    Agarwal et al. 2023 (GKD, arXiv 2306.13649). By their convention beta = 0 *is* forward
    KL and beta = 1 *is* reverse KL. That is a jump and no limit: inside (0, 1) the value tends to 0
    at both ends, where JSD_beta / beta -> KL(T||S) and JSD_beta / (1 - beta) -> KL(S||T).

    ``scaled`` returns JSD_beta / (beta (1 - beta)) inside (0, 1), which runs from one KL to the other
    without a jump. In float32 its rounding error is about 1e-7 / min(beta, 1 - beta).

    Raises:
        ValueError: if ``beta`` lies outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if beta == 0.0:
        return forward_kl(student_logp, teacher_logp, valid)
    if beta == 1.0:
        return reverse_kl(student_logp, teacher_logp, valid)
    student, teacher = _read(student_logp, teacher_logp, valid)
    mixture = _mix(beta, teacher, student)
    value = beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)
    return value / (beta * (1.0 - beta)) if scaled else value


def skewed(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"] | None = None,
    *,
    alpha: float,
    direction: Direction,
) -> Float[Tensor, "*batch"]:
    """Return the skew divergence of DistiLLM (arXiv 2402.03898).

    ``forward``: KL(T || alpha T + (1 - alpha) S). ``reverse``: KL(S || alpha S + (1 - alpha) T).
    alpha = 0 is the plain KL of that direction; as alpha grows to 1 the value tends to 0.

    Raises:
        ValueError: if ``alpha`` lies outside [0, 1) or ``direction`` is neither word.
    """
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha must be in [0, 1), got {alpha}")
    if direction not in ("reverse", "forward"):
        raise ValueError(f"direction must be 'reverse' or 'forward', got {direction!r}")
    student, teacher = _read(student_logp, teacher_logp, valid)
    first, second = (student, teacher) if direction == "reverse" else (teacher, student)
    return _kl(first, _mix(alpha, first, second))


def generalised_reverse_kl(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return sum_v [S(v) log(S(v) / T(v)) - S(v) + T(v)].

    Each term is at least 0, with equality at S(v) = T(v) alone, even where the rows hold less than all
    the mass; on rows that sum to 1 it is KL(S||T). On full-vocabulary log-probs of a support (form
    ``plain``) its gradient is exactly that part of the full reverse KL's that comes from the support:

        dL/dz_j = S_j (log(S_j/T_j) - L_raw) on the support,  -S_j L_raw off it,

    with the truncated L_raw = sum_v S(v) log(S(v) / T(v)), whose own gradient pushes mass out (Revisiting
    OPD, arXiv 2603.25562). Rounding may leave a value just below 0.
    """
    student, teacher = _read(student_logp, teacher_logp, valid)
    return _generalised_kl(student, teacher)


def generalised_forward_kl(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return sum_v [T(v) log(T(v) / S(v)) - T(v) + S(v)], as :func:`generalised_reverse_kl`.

    On full-vocabulary log-probs of a support that holds the masses P_S and P_T:

        dL/dz_j = P_T S_j - T_j + S_j (1 - P_S) on the support,  P_T S_j - S_j P_S off it.
    """
    student, teacher = _read(student_logp, teacher_logp, valid)
    return _generalised_kl(teacher, student)


def total_variation(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return 1/2 sum_v |S(v) - T(v)|, in [0, 1]; of a support without all the mass, only its part."""
    student, teacher = _read(student_logp, teacher_logp, valid)
    return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)


def plain(logp: Float[Tensor, "*batch k"], valid: Bool[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
    """Return the log-probs as they are, with ``LOG_ZERO`` at the entries that do not exist.

    A KL of these is the raw truncated sum: it may be negative and it sees mass leave the support as a
    gain (Revisiting OPD, arXiv 2603.25562: the variant that collapses). The generalised KLs do not.
    """
    return torch.where(valid, _upcast(logp), LOG_ZERO).clamp(min=LOG_ZERO)


def renormalise(
    logp: Float[Tensor, "*batch k"], valid: Bool[Tensor, "*batch k"] | None = None
) -> Float[Tensor, "*batch k"]:
    """Return log of p(v) / sum_{u in support} p(u), with ``LOG_ZERO`` at entries that do not exist.

    A softmax over the support, so logits do as well as log-probs, and a second call changes nothing
    (local support matching, arXiv 2603.25562). A support without a valid entry gives a
    finite row without gradient.
    """
    valid = torch.ones_like(logp, dtype=torch.bool) if valid is None else valid
    return torch.where(valid, plain(logp, valid).log_softmax(-1), LOG_ZERO)


def log_mass(
    logp: Float[Tensor, "*batch k"], valid: Bool[Tensor, "*batch k"] | None = None
) -> Float[Tensor, "*batch"]:
    """Return log sum_{v in support} p(v) of exact log-probs; at most 0 up to rounding."""
    valid = torch.ones_like(logp, dtype=torch.bool) if valid is None else valid
    return plain(logp, valid).logsumexp(-1)


def with_tail(
    logp: Float[Tensor, "*batch k"], valid: Bool[Tensor, "*batch k"] | None = None
) -> Float[Tensor, "*batch k+1"]:
    """Return exact log-probs on the support and, as one more category, of all that is off it.

        l = min(logsumexp_{v in support} log p(v), -1e-7),    log tail = log(-expm1(l))

    Entries that do not exist hold ``LOG_ZERO``; the tail always exists, so that the result needs no
    ``valid``. A KL of two such rows is the KL of two coarse-grained distributions: never negative,
    never above the KL over the whole vocabulary. Where the limit binds, the tail has no gradient.
    """
    valid = torch.ones_like(logp, dtype=torch.bool) if valid is None else valid
    on_support = plain(logp, valid)
    mass = on_support.logsumexp(-1, keepdim=True).clamp(max=TAIL_LIMIT)
    return torch.cat([on_support, torch.log(-torch.expm1(mass))], dim=-1)


FORMS: Mapping[Form, Callable[[Tensor, Tensor], Tensor]] = {
    "renormalised": renormalise,
    "tail": with_tail,
    "plain": plain,
}
"""Each form as a function of log-probs and ``valid``; a result needs no ``valid`` any more."""


def _upcast(logp: Tensor) -> Tensor:
    return logp.to(torch.promote_types(logp.dtype, torch.float32))


def _read(student_logp: Tensor, teacher_logp: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    # The selection stands before any arithmetic: a NaN that is computed first and masked afterwards
    # still reaches the gradient as 0 * NaN.
    dtype = torch.promote_types(student_logp.dtype, teacher_logp.dtype)
    pair = (_upcast(student_logp.to(dtype)), _upcast(teacher_logp.to(dtype)))
    if valid is not None:
        pair = (torch.where(valid, pair[0], LOG_ZERO), torch.where(valid, pair[1], LOG_ZERO))
    return pair[0].clamp(min=LOG_ZERO), pair[1].clamp(min=LOG_ZERO)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def _generalised_kl(first: Tensor, second: Tensor) -> Tensor:
    p = first.exp()
    return (p * (first - second) - p + second.exp()).sum(-1)


def _mix(weight: float, first: Tensor, second: Tensor) -> Tensor:
    """Log of weight * first + (1 - weight) * second, for a weight in [0, 1)."""
    if weight == 0.0:
        return second
    return torch.logaddexp(first + math.log(weight), second + math.log1p(-weight))
