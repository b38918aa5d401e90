"""The clipped surrogate of a policy gradient."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.functional.ratio import LOG_RATIO_LIMIT, log_ratio


def clipped_surrogate(
    student_logp: Float[Tensor, "*shape"],
    collected_logp: Float[Tensor, "*shape"],
    advantage: Float[Tensor, "*shape"],
    *,
    low: float,
    high: float,
    dual: float | None = None,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Return the loss -min(u A, clip(u, 1 - low, 1 + high) A), the ratio u, and where a bound binds.

    PPO (arXiv 1707.06347, section 3) with u = S(y) / S_collected(y). At u = 1 the gradient is
    -A grad log S(y), as without a clip; where a bound binds, which is only after a move in the direction
    that A asked for, it is 0. With ``dual`` = c the loss of a token with A < 0 is at most -c A (dual clip,
    arXiv 1912.09729), with no gradient where u > c. ``advantage`` and ``collected_logp`` are held fixed; the
    log-ratio is bounded to +-``LOG_RATIO_LIMIT``.
    """
    advantage = advantage.detach()
    log_u = log_ratio(collected_logp.detach(), student_logp)
    ratio = log_u.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    loss = -torch.minimum(ratio * advantage, bounded * advantage)
    up, down = advantage > 0, advantage < 0
    binds = (up & (ratio > 1.0 + high)) | (down & (ratio < 1.0 - low))
    if dual is not None:
        loss = torch.where(down, torch.minimum(loss, -dual * advantage), loss)
        binds = binds | (down & (ratio > dual))
    return loss, ratio.detach(), binds
