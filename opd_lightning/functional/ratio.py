"""Log-ratios and ratios of the taken token."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional.divergence import LOG_ZERO

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are bounded by this before exp: e^20 = 4.9e8 is far beyond any useful ratio and far from inf."""


def log_ratio(
    student_logp: Float[Tensor, "*shape"], teacher_logp: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return r = log T(y) - log S(y), the reward of on-policy distillation, in at least float32.

    Under y ~ S its mean is -KL(S||T). It is positive where the teacher likes the token more. The log of a
    probability of 0 counts as ``LOG_ZERO``, as in the divergences, so that a token that one model excludes has a
    large log-ratio and not an infinite one.
    """
    dtype = torch.promote_types(torch.promote_types(student_logp.dtype, teacher_logp.dtype), torch.float32)
    return teacher_logp.to(dtype).clamp(min=LOG_ZERO) - student_logp.to(dtype).clamp(min=LOG_ZERO)


def importance_weight(
    student_logp: Float[Tensor, "*shape"],
    behavior_logp: Float[Tensor, "*shape"],
    *,
    cap: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Return w = min(S(y) / mu(y), cap) for tokens y ~ mu, held fixed, in at least float32.

    Under y ~ mu, with mu > 0 wherever S is, E[w f(y)] = E_{y ~ S}[f(y)] at the same prefix; that mu also
    reaches other prefixes stays uncorrected. The log-ratio is first bounded to +-``LOG_RATIO_LIMIT``. A
    ``cap`` bounds the variance and biases the tokens at it.

    Raises:
        ValueError: if ``cap`` is not positive.
    """
    if cap is not None and not cap > 0.0:
        raise ValueError(f"cap must be positive, got {cap}")
    ratio = log_ratio(behavior_logp, student_logp).detach()
    weight = ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return weight if cap is None else weight.clamp(max=cap)


def in_band(weight: Float[Tensor, "*shape"], low: float, high: float) -> Bool[Tensor, "*shape"]:
    """Return where low <= weight <= high: tokens outside are left out, instead of cut to a bound.

    Raises:
        ValueError: unless 0 <= low <= high.
    """
    if not 0.0 <= low <= high:
        raise ValueError(f"a band must have 0 <= low <= high, got {low} and {high}")
    return (weight >= low) & (weight <= high)
