"""TrOPD's trust region."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.draws import uniform
from opd_lightning.errors import ConfigError
from opd_lightning.functional.masked import masked_fill
from opd_lightning.regularizer import _support
from opd_lightning.regularizer._outliers import add_forward_kl, clip
from opd_lightning.regularizer._trust import Gate, Gradient, Outlier, check, collected_ratio
from opd_lightning.schedule import Schedule, value_at
from opd_lightning.types import Experience, Needs, Scores, TokenLoss, Want
from opd_lightning.world import World

_DRAW = "trust_region"


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """Keeps M_t of the estimator at a student's token and treats the rest, 1 - M_t, as an outlier (TrOPD).

    With r = log T(y) - log S(y), S as it was at collection, and P = min(e^r, 1) (arXiv 2606.01249, A trust
    region): ``gate`` bernoulli is M = 1 with probability P, drawn once at collection, so that E[1 - M] is the
    total variation of S and T; expected is M = P, of the same mean and less variance; threshold is
    M = 1[r > threshold]. Outliers get, by ``outlier``:

    - clip: the advantage ``threshold`` (REOPOLD, arXiv 2603.11137: max(r, threshold) with gate=threshold);
    - mask: nothing;
    - forward_kl: ``coefficient`` times the teacher's forward KL on the support, S from the full softmax and T
      as it is or ``teacher_renormalised``. ``gradient`` direct differentiates it (the paper), scalar makes it
      the detached advantage -FKL of the drawn token (the released code), another method: it pushes down.

    clip changes the advantage and keeps the weight; forward_kl is a term of its own, beside any weight that
    was set before. Tokens of other origins stay as they are. Metrics: ``accept`` M, ``rejection`` 1 - P (its
    mean estimates the total variation without bias), ``inside_k1`` and ``inside_k1_squared`` M times -r and
    r^2, ``outlier_fkl`` (1 - M) FKL.

    Raises:
        ConfigError: for settings that are unknown, that nothing would read or that would teach nothing.
    """

    outlier: Outlier = "forward_kl"
    gate: Gate = "bernoulli"
    gradient: Gradient = "direct"
    threshold: float | Schedule | None = None
    teacher_renormalised: bool = False
    coefficient: float | Schedule = 1.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> Needs:
        """Both log-probs of the taken token, a support to compare on, or advantages to replace."""
        needs = Needs(collected_logp=True, teacher_taken=True, advantage=self.outlier == "clip")
        return needs | _support.NEEDS if self.outlier == "forward_kl" else needs

    @property
    def want(self) -> Want:
        """Log-probs of the token whose advantage it sets, and on the support."""
        if self.outlier == "forward_kl":
            return Want(taken=self.gradient == "scalar") | _support.WANT
        return Want(taken=self.outlier == "clip")

    def prepare(self, experience: Experience, world: World) -> Mapping[str, Tensor]:
        """Draw the Bernoulli gate's numbers once, for all uses of the responses."""
        rollout = experience.rollout
        if self.gate != "bernoulli":
            return {}
        shape = (rollout.ids.shape[0], rollout.ids.shape[1])
        return {_DRAW: uniform(rollout.prompt.seeds, _DRAW, shape).to(rollout.ids.device)}

    def __call__(self, loss: TokenLoss, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss with the region's tokens kept and the outliers treated."""
        sampled, ratio = experience.rollout.sampled, collected_ratio(experience)
        accept = masked_fill(self._accept(ratio, experience, progress), sampled)
        reject = masked_fill(1.0 - accept, sampled)
        metrics = {
            "accept": accept,
            "rejection": -torch.expm1(ratio.clamp(max=0.0)),
            "inside_k1": -accept * ratio,
            "inside_k1_squared": accept * ratio.square(),
        }
        loss = replace(loss, metrics={**loss.metrics, **metrics})
        if self.outlier == "clip":
            return clip(loss, scores, experience, reject, self._theta(progress))
        loss = replace(loss, weight=loss.weight * torch.where(sampled, accept, 1.0))
        if self.outlier == "mask":
            return loss
        return add_forward_kl(
            loss,
            scores,
            experience,
            reject,
            coefficient=value_at(self.coefficient, progress),
            renormalised=self.teacher_renormalised,
            scalar=self.gradient == "scalar",
        )

    def _theta(self, progress: float) -> float:
        assert self.threshold is not None
        return value_at(self.threshold, progress)

    def _accept(self, ratio: Tensor, experience: Experience, progress: float) -> Tensor:
        if self.gate == "threshold":
            return (ratio > self._theta(progress)).to(ratio.dtype)
        probability = ratio.clamp(max=0.0).exp()
        if self.gate == "expected":
            return probability
        if _DRAW not in experience.extras:
            raise ConfigError(
                "the bernoulli gate's draws are missing; prepare the experience (Objective.finish)"
            )
        return (experience.extras[_DRAW] < probability).to(ratio.dtype)
