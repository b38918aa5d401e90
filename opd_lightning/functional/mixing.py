"""Samplers between the student S and the teacher T: distributions of the next token from both log-probs.

Every function takes normalised log-probs ``[rows vocab]`` of the same categories, computes in at least
float32 and returns the normalised log-probs of the sampler mu. A probability of 0 counts as e^-1e4.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.functional.divergence import LOG_ZERO

BISECTIONS = 24
"""Halvings of [0, 1] in the search for an exponent; its error is at most 2^-24, float32's own precision."""


def linear_mix(
    student_logp: Float[Tensor, "rows vocab"], teacher_logp: Float[Tensor, "rows vocab"], alpha: float
) -> Float[Tensor, "rows vocab"]:
    """Return log(alpha T + (1 - alpha) S), MiniLLM's teacher-mixed sampler (arXiv 2306.08543).

    S / mu <= 1 / (1 - alpha) everywhere, so that weights against this sampler are bounded for alpha < 1.

    Raises:
        ValueError: ``alpha`` outside [0, 1].
    """
    _require_share(alpha, "alpha")
    student, teacher = _read(student_logp, teacher_logp)
    if alpha in (0.0, 1.0):
        return teacher if alpha else student
    return torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))


def geometric_mix(
    student_logp: Float[Tensor, "rows vocab"],
    teacher_logp: Float[Tensor, "rows vocab"],
    beta: float | Float[Tensor, "rows 1"],
) -> Float[Tensor, "rows vocab"]:
    """Return log mu with mu proportional to S^(1 - beta) T^beta, one exponent for all rows or one a row."""
    student, teacher = _read(student_logp, teacher_logp)
    return torch.log_softmax(student + beta * (teacher - student), -1)


def bounded_geometric_mix(
    student_logp: Float[Tensor, "rows vocab"], teacher_logp: Float[Tensor, "rows vocab"], epsilon: float
) -> Float[Tensor, "rows vocab"]:
    """Return log mu, mu proportional to S^(1 - b) T^b, with the largest b in [0, 1] such that KL(mu||S) <= epsilon.

    With r = log T - log S, mu is the exponential family S e^(b r) / Z(b), whose divergence from S is
    KL(mu||S) = b E_mu[r] - log Z(b), with derivative b Var_mu[r] >= 0 in b: it grows, and bisection finds
    b for each row (arXiv 2605.31159). ``epsilon`` is in nats; at 0 the sampler is the student itself.

    Raises:
        ValueError: a negative ``epsilon``.
    """
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    student, teacher = _read(student_logp, teacher_logp)
    if epsilon == 0.0:
        return student
    low = student.new_zeros(len(student), 1)
    high = torch.ones_like(low)
    # The end b = 1 is tried first: where the teacher itself is near enough, no half of the interval is cut off.
    low = torch.where(_distance(student, teacher, high) <= epsilon, high, low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        near = _distance(student, teacher, middle) <= epsilon
        low, high = torch.where(near, middle, low), torch.where(near, high, middle)
    return geometric_mix(student, teacher, low)


def _distance(student: Tensor, teacher: Tensor, beta: Tensor) -> Float[Tensor, "rows 1"]:
    """Return KL(mu||S) of the geometric mix, nats."""
    mixed = geometric_mix(student, teacher, beta)
    return (mixed.exp() * (mixed - student)).sum(-1, keepdim=True)


def _read(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student_logp.dtype, teacher_logp.dtype), torch.float32)
    return student_logp.to(dtype).clamp(min=LOG_ZERO), teacher_logp.to(dtype).clamp(min=LOG_ZERO)


def _require_share(value: float, name: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
