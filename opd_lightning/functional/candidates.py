"""A policy gradient on every candidate of a position, where only one was drawn."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional.divergence import plain, renormalise

CandidateWeight = Literal["student", "teacher", "uniform", "student_full"]
CANDIDATE_WEIGHTS: tuple[str, ...] = get_args(CandidateWeight)


def candidate_weights(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"],
    kind: CandidateWeight,
) -> Float[Tensor, "*batch k"]:
    """Return w_k, held fixed: S, T or a constant, each divided by its sum over the valid candidates.

    ``student_full`` is S as it is, not divided. Candidates that are not valid weigh 0.
    """
    if kind == "uniform":
        weight = valid.to(torch.promote_types(student_logp.dtype, torch.float32))
        return weight / weight.sum(-1, keepdim=True).clamp(min=1.0)
    logp = teacher_logp if kind == "teacher" else student_logp
    read = plain if kind == "student_full" else renormalise
    return torch.where(valid, read(logp.detach(), valid).exp(), 0.0)


def candidate_loss(
    student_logp: Float[Tensor, "*batch k"],
    teacher_logp: Float[Tensor, "*batch k"],
    valid: Bool[Tensor, "*batch k"],
    kind: CandidateWeight,
) -> Float[Tensor, "*batch"]:
    """Return -sum_k A_k log S_k with A_k = -w_k (log S_k - log T_k), held fixed.

    The score-function form of a reverse KL, with every candidate in place of a drawn one. Log-probs are those
    of the full vocabulary, so that logits of other ids have a gradient too. At w = S (``student_full``) it is
    the support's part of the gradient of KL(S||T), over all ids the whole; at S renormalised it is that
    divided by the mass P_S of the support.
    """
    student, teacher = plain(student_logp, valid), plain(teacher_logp, valid)
    weight = candidate_weights(student_logp, teacher_logp, valid, kind)
    advantage = -weight * (student - teacher).detach()
    return -(advantage * student).sum(-1)
