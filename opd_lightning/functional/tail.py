"""Reverse KL from a support and the taken token: the exact sum on the support, a sample of all the rest.

Variants V4 (the student's top k) and V5 (the teacher's) of Revisiting OPD (arXiv 2603.25562).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional.divergence import LOG_ZERO, generalised_reverse_kl, plain, reverse_kl
from opd_lightning.functional.ratio import log_ratio

Correction = Literal["none", "plus_one", "generalised"]

_HEADS: Mapping[Correction, Callable[[Tensor, Tensor], Tensor]] = {
    "none": reverse_kl,
    "plus_one": reverse_kl,
    "generalised": generalised_reverse_kl,
}


def head_with_sampled_tail(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"],
    taken_student_logp: Float[Tensor, "*batch"],
    taken_teacher_logp: Float[Tensor, "*batch"],
    taken_in_support: Bool[Tensor, "*batch"],
    *,
    correction: Correction,
    weight: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return head + tail, nats; log-probs are those of the full vocabulary, on the support and taken.

        head = sum_{v in support} S(v) log(S(v) / T(v))
        tail = w 1[y not in support] sg(log S(y)/T(y)) S(y)/sg(S(y))

    The last factor is 1 and carries the gradient. ``weight`` is w = S(y) / (probability of y where it was
    drawn), held fixed, clipped by the caller if at all, and 1 if not given. With y drawn at the temperature
    of the log-probs, the means over y are, with P_S and P_T the masses on the support:

        ===========  ====================  ==================  ========================================
        correction   mean value            mean gradient       how
        ===========  ====================  ==================  ========================================
        none         KL(S||T)              grad KL + grad P_S  as published: pushes mass off the support
        plus_one     KL(S||T)              grad KL             the tail's gradient has sg(log S/T) + 1
        generalised  KL(S||T) - P_S + P_T  grad KL             generalised reverse KL as the head
        ===========  ====================  ==================  ========================================

    Which form the head has is part of ``correction``; entries that are not ``valid`` do not matter, nor do
    the taken log-probs and the weight where ``taken_in_support``. The teacher and the support are held fixed.

    Raises:
        ValueError: for an unknown ``correction``.
    """
    if correction not in _HEADS:
        raise ValueError(f"correction must be one of {', '.join(_HEADS)}, got {correction!r}")
    head = _HEADS[correction](plain(student_logp, valid), plain(teacher_logp, valid).detach())
    # Chosen before any arithmetic, as what stands at the other places may be infinite; two zeros make no tail.
    student = torch.where(taken_in_support, 0.0, taken_student_logp)
    teacher = torch.where(taken_in_support, 0.0, taken_teacher_logp).clamp(min=LOG_ZERO)
    cost = -log_ratio(student, teacher).detach()
    score = student.to(cost.dtype)
    score = score - score.detach()  # 0 with the gradient of log S(y)
    tail = cost + (cost + 1.0 if correction == "plus_one" else cost) * score
    if weight is None:
        return head + tail
    return head + torch.where(taken_in_support, 0.0, weight.detach()) * tail
