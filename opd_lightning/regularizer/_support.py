"""Forward KL to the teacher on the support, as several regularizers add it to some of the tokens."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.functional.divergence import forward_kl, plain, renormalise
from opd_lightning.functional.masked import masked_fill
from opd_lightning.types import Experience, FullTerm, Needs, Scores, Want

FULL = FullTerm("teacher", forward_kl)

NEEDS = Needs(support=True, least_support=1)
"""What has to be collected for :func:`teacher_forward_kl`."""

WANT = Want(support="exact", full=frozenset({FULL}))
"""What the student has to score for :func:`teacher_forward_kl`: its log-probs under the full softmax."""


def teacher_forward_kl(
    scores: Scores, experience: Experience, mask: Bool[Tensor, "batch time"], *, renormalised: bool
) -> Float[Tensor, "batch time"]:
    """Return sum_{v in support} T(v) log(T(v) / S(v)) at the tokens of ``mask``, 0 elsewhere, nats.

    S is normalised over the whole vocabulary, so that mass off the support counts as missing. T is as it is,
    or with ``renormalised`` divided by its mass P_T on the support; the gradient is then 1 / P_T times

        dL/dz_j = P_T S_j - T_j on the support,  P_T S_j off it    (raw forward KL, T as it is).

    On the full support both are KL(T||S). As it is, the truncated sum may be negative.

    Raises:
        ConfigError: if neither log-probs on a support nor the full term were scored.
    """
    if experience.teacher_hidden is not None:
        if FULL not in scores.full:
            raise ConfigError("on the full support the scores must hold the forward KL; ask for it in `want`")
        return masked_fill(scores.full[FULL], mask)
    student, teacher = scores.support_logp, experience.support_teacher_logp
    if student is None or teacher is None or experience.support_valid is None:
        raise ConfigError("`support` must select tokens to compare on, got none; use support=teacher")
    # Outside the mask nothing is read: a NaN there would reach the gradient through the divergence.
    valid = experience.support_valid & mask.unsqueeze(-1)
    target = (renormalise if renormalised else plain)(teacher, valid)
    return masked_fill(forward_kl(plain(student, valid), target), mask)
