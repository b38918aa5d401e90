"""What the tests of gates share: scores on the teacher's top k, the collected student, tables of truth."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from tabular import World
from torch import Tensor

from opd_lightning.estimator.token import Token
from opd_lightning.protocols import Regularizer
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Experience, Scores, TokenLoss

TOKEN = Token(reward=LogRatio())

close = partial(torch.testing.assert_close, atol=1e-9, rtol=0)
same = partial(torch.testing.assert_close, atol=0, rtol=0)


def collected(world: World, experience: Experience) -> Experience:
    """The same experience, collected from the student as it is."""
    return replace(experience, collected_logp=world.taken(world.student_logp.detach()))


def scored(world: World, k: int = 2) -> tuple[Scores, Experience]:
    """Scores and experience on the teacher's top k, with the teacher's entropy (padding must not matter)."""
    scores, experience = world.on_support(TeacherTopK(k=k))
    entropy = -(world.teacher_logp.exp() * world.teacher_logp).sum(-1)[world.rows]
    return scores, replace(collected(world, experience), teacher_entropy=entropy)


def drawn(experience: Experience, number: float) -> Experience:
    """The same experience with one number in place of every draw of the trust region."""
    return replace(experience, extras={"trust_region": torch.full(experience.rollout.ids.shape, number)})


def applied(part: Regularizer, scores: Scores, experience: Experience) -> TokenLoss:
    """The token estimator's loss, changed by ``part``."""
    return part(TOKEN(scores, experience, 0.0), scores, experience, 0.0)


def written(loss: TokenLoss) -> Tensor:
    """What the objective sums."""
    return loss.value * loss.weight


def tables(world: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S, T, the probability of acceptance and the visits, each [prefix vocab] or [prefix 1]."""
    s, t = world.student_logp.detach().exp(), world.teacher_logp.exp()
    visits = torch.tensor([world.visits[p] for p in world.prefixes], dtype=torch.float64).unsqueeze(-1)
    return s, t, (t / s).clamp(max=1.0), visits


def with_scores(inner: Tensor, s: Tensor) -> Tensor:
    """sum_v inner_v grad log S(v), by d log S(v) / dz = onehot(v) - S."""
    return inner - s * inner.sum(-1, keepdim=True)


def top(t: Tensor, k: int) -> Tensor:
    """True at the k largest entries of each row."""
    return torch.zeros_like(t, dtype=torch.bool).scatter(-1, t.topk(k, -1).indices, True)


def dirty(world: World, scores: Scores, experience: Experience, fill: float) -> tuple[Scores, Experience]:
    """The same with ``fill`` in everything that stands in padding."""

    def put(tensor: Tensor) -> Tensor:
        # A sum and no selection, so that a NaN in the gradient at padding is seen.
        at = ~world.mask if tensor.dim() == 2 else ~world.mask.unsqueeze(-1)
        return tensor + torch.where(at, fill, 0.0)

    names = ("teacher_taken_logp", "collected_logp", "support_teacher_logp", "teacher_entropy")
    experience = replace(experience, **{name: put(getattr(experience, name)) for name in names})
    own = {"taken_logp": put(scores.taken_logp), "support_logp": put(scores.support_logp)}
    return replace(scores, **own), experience


def unmoved(world: World, first: TokenLoss, second: TokenLoss, atol: float = 1e-12) -> None:
    """Two losses with the same value and expected gradient."""
    difference = torch.where(world.mask, written(first) - written(second), 0.0)
    close(difference, torch.zeros_like(difference), atol=atol)
    expected = (difference * world.probability.detach().unsqueeze(-1)).sum()
    close(world.gradient(expected), torch.zeros_like(world.theta), atol=atol)
