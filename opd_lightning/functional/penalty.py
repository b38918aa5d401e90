"""Penalties on the taken token, from its two log-probs: d = log S(y) - log T(y), rho = T(y) / S(y) = e^-d.

The penalty of a token as a *value* and the gradient of its expectation as a *loss* are two matters. With
y ~ S, and the prefix given, differentiating each penalty directly has on average the gradient

    =========  ==================  =====================  =======================================
    name       penalty             its mean as a value    mean gradient, differentiated directly
    =========  ==================  =====================  =======================================
    k1         d                   KL(S||T)               0: it teaches nothing
    k2         d^2 / 2             biased for KL(S||T)    that of KL(S||T), exactly
    k3         rho + d - 1         KL(S||T)               that of KL(T||S): *forward* KL
    absolute   |d|                 biased for KL(S||T)    E[sign(d) grad log S(y)]: no divergence's
    =========  ==================  =====================  =======================================

As a detached advantage (loss d log S(y) with d held fixed), k1 gives the gradient of KL(S||T).
Names as in J. Schulman's note "Approximating KL divergence" (2020). Every function takes log-probs of any
shape, computes in at least float32, in nats, and differentiates into whichever argument asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from opd_lightning.functional.ratio import LOG_RATIO_LIMIT, log_ratio

Penalty = Literal["k1", "k2", "k3", "absolute"]


def k1(
    student_logp: Float[Tensor, "*shape"], teacher_logp: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return d = log S(y) - log T(y), of either sign. Differentiated directly, E_S[grad] = 0."""
    return -log_ratio(student_logp, teacher_logp)


def k2(
    student_logp: Float[Tensor, "*shape"], teacher_logp: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return d^2 / 2. Differentiated directly, E_S[grad] = grad KL(S||T)."""
    return 0.5 * log_ratio(student_logp, teacher_logp).square()


def k3(
    student_logp: Float[Tensor, "*shape"],
    teacher_logp: Float[Tensor, "*shape"],
    *,
    clamp: float | None = None,
) -> Float[Tensor, "*shape"]:
    """Return rho - log rho - 1 >= 0, with rho = T(y) / S(y). Directly, E_S[grad] = grad KL(T||S).

    ``clamp`` is the largest value; a token at it has no gradient. At 10, as some frameworks have it, these
    are the tokens with rho above 13.6 or below 1.7e-5. Above e^20, where rho soon would leave float32, the
    penalty stays what it is at e^20, without gradient.

    Raises:
        ValueError: if ``clamp`` is not positive.
    """
    if clamp is not None and not clamp > 0.0:
        raise ValueError(f"clamp must be positive, got {clamp}")
    # Bounded before exp: a clamp of the result alone would leave 0 * inf = NaN in the gradient.
    reward = log_ratio(student_logp, teacher_logp).clamp(max=LOG_RATIO_LIMIT)
    penalty = reward.expm1() - reward
    return penalty if clamp is None else penalty.clamp(max=clamp)


def absolute(
    student_logp: Float[Tensor, "*shape"], teacher_logp: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return |d|. Directly, E_S[grad] = E_S[sign(d) grad log S(y)], the gradient of no divergence."""
    return log_ratio(student_logp, teacher_logp).abs()


PENALTIES: Mapping[Penalty, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "absolute": absolute,
}
"""Each penalty by its name, k3 without a clamp."""
