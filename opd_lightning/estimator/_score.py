"""What the score-function estimators share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd_lightning.comparison import full_term
from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.divergence import plain, reverse_kl
from opd_lightning.functional.masked import masked_fill, masked_sum
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.functional.returns import discounted_return
from opd_lightning.protocols import Reward
from opd_lightning.types import Experience, FullTerm, Needs, Origin, Scores, TokenLoss, Want
from opd_lightning.world import World

Baseline = Literal["none", "reverse_kl"]
Normalise = Literal["none", "whiten", "length", "length_whiten"]

_FULL = FullTerm("teacher", reverse_kl)
_LEAST_DEVIATION = 1e-8
_MEAN, _DEVIATION = "advantage_mean", "advantage_deviation"
_CHOICES = {
    "baseline": (("none", "reverse_kl"), "use none"),
    "normalise": (("none", "whiten", "length", "length_whiten"), "use none"),
}


@dataclass(frozen=True, kw_only=True)
class ScoreFunction:
    """value_t = -sg(A_t) log S(y_t), with A_t from the returns G_t that a subclass makes of the rewards.

    Its gradient is -A grad log S(y), the policy gradient of A. Rewards and returns run over
    ``rollout.sampled`` and not over the loss mask: a token that teaches nothing still happened, so it does not
    cut the credit of the tokens before it.

    ``baseline=reverse_kl`` adds KL(S||T) at c_t to the return (vOPD, arXiv 2605.07865): a number of the position,
    which changes no expected gradient, and makes the mean of r_t + KL exactly 0. Over the whole vocabulary with
    support=full; on another support the plain truncated sum, still without bias but not of mean 0.

    ``normalise``: ``length`` divides a return by the number of tokens from its own to the end of its stretch
    (MiniLLM, arXiv 2306.08543). ``whiten`` subtracts the mean and divides by the standard deviation of the
    advantages of the optimizer step's loss, over all ranks, as they were at collection; a bias of
    O(1 / tokens), and more noise the closer S is to T. ``length_whiten``: both, in that order.

    ``origins`` has one legal value. On tokens that others drew the score has no mean of 0: without importance
    weights, r as their advantage has the gradient of neither KL, and -r, the k1 of KL(T||S) on the teacher's
    tokens, points away from imitation.

    Raises:
        ConfigError: for an unknown word, other origins, or a baseline beside whitening.
    """

    reward: Reward
    baseline: Baseline = "none"
    normalise: Normalise = "none"
    origins: Sequence[str] = ("student",)

    advantage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "origins", tuple(self.origins))
        require(
            Origin.named(self.origins, "estimator.origins") == {Origin.STUDENT},
            "estimator.origins",
            "be [student] for a score function (on tokens that others drew, without importance weights, its "
            "expected gradient is no KL's, and with the sign of the teacher's k1 opposite to imitation)",
            list(self.origins),
            "use estimator=likelihood for other tokens, or regularizer=[imitation] beside this one",
        )
        for name, (words, remedy) in _CHOICES.items():
            value = getattr(self, name)
            require(value in words, f"estimator.{name}", f"be one of {', '.join(words)}", value, remedy)
        require(
            self.baseline == "none" or not self._whitens,
            "estimator.baseline",
            f"be none with normalise={self.normalise}, which subtracts a baseline of its own",
            self.baseline,
            "use estimator.normalise=none or length beside it",
        )

    @property
    def _whitens(self) -> bool:
        return self.normalise.endswith("whiten")

    @property
    def needs(self) -> Needs:
        """The teacher's log-prob of the taken token, and what reward, baseline and whitening read."""
        needs = Needs(teacher_taken=True, collected_logp=self._whitens) | self.reward.needs
        if self.baseline == "none":
            return needs
        return needs | Needs(support=True, least_support=1, fixed_support=True)

    @property
    def want(self) -> Want:
        """The student's log-prob of the taken token, and what the baseline reads."""
        if self.baseline == "none":
            return Want(taken=True)
        return Want(taken=True, support="exact", full=frozenset({_FULL}))

    def _returns(
        self, rewards: Float[Tensor, "batch time"], sampled: Bool[Tensor, "batch time"], progress: float
    ) -> Float[Tensor, "batch time"]:
        raise NotImplementedError

    def prepare(self, experience: Experience, world: World) -> Mapping[str, Float[Tensor, "batch time"]]:
        """Return mean and standard deviation of the step's advantages, for whitening; else nothing."""
        if not self._whitens:
            return {}
        advantage = self._advantage(experience.collected_logp, experience, experience.progress).double()
        inside = experience.share > 0
        count = world.total(inside.sum().double()).clamp(min=1.0)
        mean = world.total(masked_sum(advantage, inside)) / count
        variance = world.total(masked_sum((advantage - mean).square(), inside)) / count
        shape = experience.rollout.ids.shape
        dtype = torch.promote_types(experience.share.dtype, torch.float32)
        numbers = {_MEAN: mean, _DEVIATION: variance.sqrt()}
        return {name: number.to(dtype).expand(shape).clone() for name, number in numbers.items()}

    def _advantage(
        self, student_logp: Tensor | None, experience: Experience, progress: float
    ) -> Float[Tensor, "batch time"]:
        """Return the returns of the rewards, by length if asked."""
        if student_logp is None or experience.teacher_taken_logp is None:
            raise ConfigError("a score-function estimator needs both models' log-probs of the taken token")
        sampled = experience.rollout.sampled
        student = masked_fill(student_logp.detach(), sampled)
        teacher = masked_fill(experience.teacher_taken_logp, sampled)
        returns = self._returns(self.reward(student, teacher, experience), sampled, progress).detach()
        if self.normalise.startswith("length"):
            to_go = discounted_return(sampled.to(returns.dtype), sampled, gamma=1.0)
            returns = returns / to_go.clamp(min=1.0)
        return returns

    def _baseline(self, scores: Scores, experience: Experience) -> Float[Tensor, "batch time"]:
        """Return the reverse KL of each position, held fixed."""
        sampled = experience.rollout.sampled
        if experience.teacher_hidden is not None:
            return masked_fill(full_term(scores, _FULL).detach(), sampled)
        student, teacher = scores.support_logp, experience.support_teacher_logp
        if student is None or teacher is None or experience.support_valid is None:
            raise ConfigError(
                "`estimator.baseline` must have a support to sum over, got none; use support=full"
            )
        valid = experience.support_valid & sampled.unsqueeze(-1)
        return masked_fill(reverse_kl(plain(student.detach(), valid), plain(teacher, valid)), sampled)

    def __call__(self, scores: Scores, experience: Experience, progress: float) -> TokenLoss:
        """Return value and weight at every response position."""
        sampled = experience.rollout.sampled
        advantage = self._advantage(scores.taken_logp, experience, progress)
        if self.baseline != "none":
            advantage = advantage + self._baseline(scores, experience)
        if self._whitens:
            advantage = self._whitened(advantage, experience)
        assert scores.taken_logp is not None
        assert experience.teacher_taken_logp is not None
        student = masked_fill(scores.taken_logp, sampled)
        ratio = log_ratio(student.detach(), masked_fill(experience.teacher_taken_logp, sampled))
        return TokenLoss(
            value=-advantage * student,
            weight=sampled.to(student.dtype),
            advantage=advantage,
            metrics={"log_ratio": ratio, "advantage": advantage},
        )

    def _whitened(self, advantage: Tensor, experience: Experience) -> Float[Tensor, "batch time"]:
        if _MEAN not in experience.extras:
            raise ValueError("whitening reads what `prepare` computed; call Objective.finish first")
        mean, deviation = experience.extras[_MEAN], experience.extras[_DEVIATION]
        sampled = experience.rollout.sampled
        return masked_fill((advantage - mean) / (deviation + _LEAST_DEVIATION), sampled)
