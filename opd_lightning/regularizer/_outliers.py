"""What the tokens outside a trust region are given."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.functional.masked import masked_fill
from opd_lightning.regularizer._support import teacher_forward_kl
from opd_lightning.regularizer._terms import add
from opd_lightning.types import Experience, Scores, TokenLoss


def clip(
    loss: TokenLoss,
    scores: Scores,
    experience: Experience,
    reject: Float[Tensor, "batch time"],
    threshold: float,
) -> TokenLoss:
    """Return the loss with the advantage (1 - reject) A + reject threshold at the student's own tokens."""
    if loss.advantage is None or scores.taken_logp is None:
        raise ConfigError(
            "a clip needs an estimator's advantages and the student's log-probs of the taken token"
        )
    sampled = experience.rollout.sampled
    counted = sampled & (loss.weight != 0)
    # Selected before it meets a gradient: an infinite threshold rejects no token, and 0 * inf is NaN.
    change = torch.where(counted & (reject > 0), reject * threshold, 0.0)
    value = (1.0 - reject) * masked_fill(loss.value, counted) - change * masked_fill(
        scores.taken_logp, counted
    )
    advantage = (1.0 - reject) * masked_fill(loss.advantage, counted) + change
    return replace(
        loss,
        value=torch.where(sampled, value, loss.value),
        advantage=torch.where(sampled, advantage, loss.advantage),
    )


def add_forward_kl(
    loss: TokenLoss,
    scores: Scores,
    experience: Experience,
    reject: Float[Tensor, "batch time"],
    *,
    coefficient: float,
    renormalised: bool,
    scalar: bool,
) -> TokenLoss:
    """Return the loss with reject * coefficient * FKL added, or with its negative as detached advantage."""
    outlier = reject > 0
    divergence = teacher_forward_kl(scores, experience, outlier, renormalised=renormalised)
    metrics = {**loss.metrics, "outlier_fkl": reject * divergence.detach()}
    loss, term = replace(loss, metrics=metrics), coefficient * reject * divergence
    if not scalar:
        return add(loss, term, outlier)
    if scores.taken_logp is None:
        raise ConfigError("a scalar forward KL needs the student's log-probs of the taken token")
    change = -term.detach()
    loss = add(loss, -change * masked_fill(scores.taken_logp, outlier), outlier)
    return loss if loss.advantage is None else replace(loss, advantage=loss.advantage + change)
