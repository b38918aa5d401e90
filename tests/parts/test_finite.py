"""Where a probability is 0 or a response is empty, every part keeps value, gradient and metrics finite."""

from dataclasses import replace
from math import inf

import everything
import pytest
import torch
from tabular import World as Tables

from opd_lightning.world import World

every = pytest.mark.parametrize("part", [part[-1] for part in everything.LOSSES])
VOCAB = 4


@pytest.fixture(scope="module")
def composed():
    return everything.composed(everything.LOSSES)


@pytest.fixture
def tables():
    return Tables(VOCAB, 3)


def step(tables, objective, scores, experience):
    """The loss of a step, after all that it shows was seen to be finite."""
    experience = objective.finish(experience, World())
    value, metrics = objective.loss(scores, experience, 0.5)
    gradient = tables.gradient(value)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert all(metric.isfinite() for metric in metrics.values()), metrics
    return value.item(), gradient


# numerics 11.24
@every
@pytest.mark.parametrize("k", [2, VOCAB, VOCAB + 5])
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
def test_models_that_exclude_ids(tables, composed, part, k, who):
    """A teacher of one id alone, log 0 elsewhere; a student to whom an id is impossible in float64."""
    if who != "student":
        tables.teacher = torch.where(torch.arange(VOCAB) == 1, 0.0, -inf).double().expand_as(tables.teacher)
    if who != "teacher":
        shut = torch.where(torch.arange(VOCAB) == 2, -1e6, 0.0)
        tables.theta = (tables.theta + shut).detach().requires_grad_()
        assert (tables.student_logp.exp()[:, 2] == 0).all()
    step(tables, composed[part], *everything.seen(tables, composed[part], k))


# numerics 11.24
@every
@pytest.mark.parametrize("what", ["responses", "horizons"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_rows_without_a_token_in_the_loss(tables, composed, part, what, all_of_them):
    """They change nothing beside others, though they hold what is not finite, and are 0 with a graph alone."""
    objective = composed[part]
    scores, experience = everything.seen(tables, objective)
    out = (
        torch.ones(len(tables.ids), dtype=torch.bool)
        if all_of_them
        else torch.arange(len(tables.ids)) % 4 == 1
    )
    mask = tables.mask & ~out.unsqueeze(-1)
    if what == "responses":
        rollout, garbage = replace(experience.rollout, mask=mask), inf
    else:
        rollout, garbage = replace(experience.rollout, horizon=mask), 0.0
    valid = experience.support_valid & rollout.mask.unsqueeze(-1)
    teacher = torch.where(rollout.mask, experience.teacher_taken_logp, garbage)
    rows = replace(experience, rollout=rollout, support_valid=valid, teacher_taken_logp=teacher)
    value, gradient = step(tables, objective, scores, rows)
    if all_of_them:
        assert value == 0.0
        assert not gradient.any()
        return
    expected, wanted = step(
        tables,
        objective,
        everything.seen(tables, objective)[0].rows(~out),
        rows.rows((~out).nonzero().flatten()),
    )
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=1e-9)
