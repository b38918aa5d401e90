"""What is minimised: an estimator, the support it compares on, regularizers, masks and one reduction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.errors import ConfigError
from opd_lightning.functional.masked import weighted_sum
from opd_lightning.protocols import Estimator, Mask, Prepares, Reduction, Regularizer, Support
from opd_lightning.types import Experience, Needs, Origin, Scores, TokenLoss, Want
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The parts of a loss, checked against each other once and shared by both halves of a run.

    The collecting half reads :attr:`needs` and calls :meth:`finish`; the learning half reads :attr:`want`
    and calls :meth:`loss`. The loss of an optimizer step is
    ``sum over its tokens of share * weight * value``, where the shares sum to 1 over the whole step.

    Raises:
        ConfigError: parts that cannot work together, with the remedy.
    """

    estimator: Estimator
    support: Support
    reduction: Reduction
    regularizers: Mapping[str, Regularizer] = field(default_factory=dict)
    masks: Mapping[str, Mask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, part in self._parts().items():
            needs = part.needs
            if needs.support and not self.support.needs.support:
                raise ConfigError(
                    f"`support` must select the tokens that {name} compares, got none; "
                    "add support=teacher (or student, augmented, union, full)"
                )
            size = self.support.size
            if needs.support and size is not None and size < needs.least_support:
                raise ConfigError(
                    f"`support` must hold at least {needs.least_support} tokens for {name}, got {size}: over one token "
                    "a renormalised divergence is always 0, and one token against all others is no estimate of it; "
                    "use support.k=16, estimator=token for the sampled token alone, or estimator.form=tail with "
                    "estimator.biased=true"
                )
            if needs.reference_support and self.support.needs.full:
                raise ConfigError(
                    f"`support` must select tokens for {name}, got the whole vocabulary; "
                    "use regularizer.reference_kl.form=full, or support=teacher"
                )
            if needs.fixed_support and getattr(self.support, "follows_taken", False):
                raise ConfigError(
                    f"`support` must not depend on the taken token for {name} (its baseline would favour some tokens), "
                    f"got {type(self.support).__name__}; use support=full, teacher, student or union"
                )
            if needs.advantage and not getattr(self.estimator, "advantage", False):
                raise ConfigError(
                    f"`estimator` must have advantages for {name}, got {type(self.estimator).__name__}, which "
                    "differentiates its value directly; use estimator=token, discounted or sequence, or leave it out"
                )

    def _parts(self) -> dict[str, Estimator | Regularizer]:
        estimator = {f"estimator {type(self.estimator).__name__}": self.estimator}
        return estimator | {f"regularizer {name}": part for name, part in self.regularizers.items()}

    @property
    def uses_support(self) -> bool:
        """Whether a loss is evaluated on the support (otherwise it feeds diagnostics only)."""
        return any(part.needs.support for part in self._parts().values())

    @property
    def needs(self) -> Needs:
        """What must be collected, over all parts.

        A full support that no part compares on asks for nothing: it has no ids to show either.
        """
        needs = self.support.needs
        if needs.full and not self.uses_support:
            needs = Needs(support=False)
        for part in (*self._parts().values(), *self.masks.values()):
            needs = needs | part.needs
        return needs

    @property
    def want(self) -> Want:
        """What the student is asked for in the learning half.

        A part that compares on the support asks for log-probs there and names the full term that stands
        for it; the support decides which of the two is computed.
        """
        want = Want()
        for part in self._parts().values():
            want = want | part.want
        if self.support.needs.full:
            return replace(want, support="none")
        return replace(want, full=frozenset(term for term in want.full if term.target != "teacher"))

    @property
    def teachers(self) -> dict[str, frozenset[Origin]]:
        """Whose tokens each part puts into the loss."""
        return {name: part.needs.teaches for name, part in self._parts().items()}

    @property
    def teaches(self) -> frozenset[Origin]:
        """Whose tokens some part puts into the loss."""
        return frozenset().union(*self.teachers.values())

    @property
    def shares_alone(self) -> bool:
        """Whether a full term's factor in the loss is the token's share: nothing changes the estimator's weights."""
        return not self.regularizers and not self.reduction.per_origin

    def mask(self, experience: Experience, world: World) -> Bool[Tensor, "batch time"]:
        """Return the tokens in the loss: inside the horizon, of an origin that a part teaches, not masked."""
        inside = experience.rollout.written_by(self.teaches)
        for mask in self.masks.values():
            inside = inside & mask(experience, inside, world)
        return inside

    def finish(self, experience: Experience, world: World) -> Experience:
        """Return one optimizer step's experience with its shares and with what parts prepare over it."""
        inside = self.mask(experience, world)
        if self.reduction.per_origin:
            own = experience.rollout.origin == Origin.STUDENT
            share = self.reduction(inside & own, world.total) + self.reduction(inside & ~own, world.total)
        else:
            share = self.reduction(inside, world.total)
        experience = replace(experience, share=share)
        extras: dict[str, Tensor] = {}
        for part in self._parts().values():
            if isinstance(part, Prepares):
                extras |= part.prepare(experience, world)
        return replace(experience, extras=extras)

    def token_loss(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return the loss per token: the estimator's, changed by each regularizer in order."""
        loss = self.estimator(scores, experience, progress)
        for regularizer in self.regularizers.values():
            loss = regularizer(loss, scores, experience, progress)
        return loss

    def loss(
        self, scores: Scores, experience: Experience, progress: float
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return this micro-batch's part of the step's loss, and of each per-token metric's mean.

        Parts of the micro-batches and ranks of one optimizer step add up; a token outside the loss
        contributes nothing, even if its value is not finite.
        """
        loss = self.token_loss(scores, experience, progress)
        value = weighted_sum(loss.value * loss.weight, experience.share)
        metrics = {name: weighted_sum(m.detach(), experience.share) for name, m in loss.metrics.items()}
        return value, metrics
