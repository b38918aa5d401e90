"""Early stopping is a mask of the first N tokens, but for its cost: numerics.md section 11, point 20."""

from dataclasses import replace

import pytest
import torch
from tabular import World as Tabular

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.estimator.discounted import Discounted
from opd_lightning.estimator.topk import TopK
from opd_lightning.mask.first import First
from opd_lightning.objective import Objective
from opd_lightning.protocols import Writers
from opd_lightning.reduction.sequence_mean import SequenceMean
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.support.full import Full
from opd_lightning.types import Finish, Generation
from opd_lightning.world import World


def rollout_of(world: Tabular, horizon: int | None):
    """Every response of the tabular world, each a row; with a horizon the beginning of the same draws."""

    def write(prompts, sampling):
        width = min(sampling.max_new_tokens, world.time)
        done = world.mask.sum(-1) <= width
        return Generation(
            ids=world.ids[:, :width],
            mask=world.mask[:, :width],
            behavior_logp=torch.zeros(len(done), width),
            finish=torch.where(done, int(Finish.EOS), int(Finish.LENGTH)),
        )

    sampler = StudentRollout(
        samples=1,
        max_new_tokens=horizon or world.time,
        loss_horizon=horizon,
        early_stop=horizon is not None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
    )
    writers = Writers(student=write, teacher=write, gold=write, mixed=write)
    return sampler(world.rollout.prompt, writers, 0.0, 0)


def losses(world: Tabular, horizon: int | None, mask: First | None, estimator, scores_of):
    """Value and gradient of one optimizer step."""
    rollout = rollout_of(world, horizon)
    width = rollout.ids.shape[-1]
    scores, seen = scores_of(world)
    names = ("teacher_taken_logp", "teacher_hidden", "share")
    cut = {n: getattr(seen, n)[:, :width] for n in names if getattr(seen, n) is not None}
    seen = replace(seen, rollout=rollout, **cut)
    scores = replace(
        scores,
        taken_logp=scores.taken_logp[:, :width],
        full={t: v[:, :width] for t, v in scores.full.items()},
    )
    objective = Objective(
        estimator=estimator,
        support=Full(),
        reduction=SequenceMean(),
        masks={} if mask is None else {"first": mask},
    )
    value, _ = objective.loss(scores, objective.finish(seen, World()), 0.0)
    return value.detach(), world.gradient(value)


def exact():
    """Reverse KL over the whole vocabulary, differentiated directly."""
    estimator = TopK(divergence=ReverseKL(), form="renormalised")
    (term,) = estimator.want.full
    return estimator, lambda world: world.on_everything(term.divergence)


def score_function(gamma):
    """The sampled token's, with discounted credit."""
    return Discounted(gamma=gamma, reward=LogRatio()), lambda world: (world.scores, world.experience)


@pytest.mark.parametrize("kind", ["exact", "gamma 0"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equals_the_mask(world, kind, n):
    part = exact() if kind == "exact" else score_function(0.0)
    stopped = losses(world, n, None, *part)
    masked = losses(world, None, First(count=n), *part)
    torch.testing.assert_close(stopped, masked, rtol=0, atol=1e-12)
    whole = losses(world, None, None, *part)
    if n < world.time:
        assert (whole[1] - masked[1]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(whole, masked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [4, 100])
def test_a_horizon_beyond_the_end_is_the_whole_loss(world, n):
    part = exact()
    whole = losses(world, None, None, *part)
    for horizon, mask in ((n, None), (None, First(count=n))):
        torch.testing.assert_close(losses(world, horizon, mask, *part), whole, rtol=0, atol=1e-12)


def test_credit_from_beyond_the_horizon_tells_them_apart(world):
    """gamma 1: a masked response still credits what its later tokens earned."""
    part = score_function(1.0)
    stopped = losses(world, 1, None, *part)
    masked = losses(world, None, First(count=1), *part)
    assert (stopped[1] - masked[1]).abs().max() > 1e-3
