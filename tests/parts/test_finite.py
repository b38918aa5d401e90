"""Where a probability is 0 or a response is empty, every part keeps value, gradient and metrics finite."""

from dataclasses import replace
from math import inf

import pytest
import torch
from hydra import compose, initialize_config_dir
from tabular import World as Tables
from tabular import stale, with_reference

from opd_lightning.paths import CONF_DIR
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.train import objective_from
from opd_lightning.types import Origin
from opd_lightning.world import World

NAMES = {
    g: sorted(f.stem for f in (CONF_DIR / g).glob("*.yaml")) for g in ("estimator", "reward", "regularizer")
}
PARTS = [
    *([f"estimator={name}"] for name in NAMES["estimator"]),
    *(["estimator=token", f"reward={name}"] for name in NAMES["reward"]),
    *(["estimator=token", f"regularizer=[{name}]"] for name in NAMES["regularizer"]),
]
every = pytest.mark.parametrize("part", PARTS, ids=lambda part: part[-1])
VOCAB = 4


@pytest.fixture(scope="module")
def composed():
    """The objective of each part, as the command composes it."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return {p[-1]: objective_from(compose("train", [*p, "support=teacher"])) for p in PARTS}


@pytest.fixture
def tables():
    return Tables(VOCAB, 3)


def seen(tables, k=3):
    """Scores and experience that hold all that a part reads on the teacher's top k; every origin is there."""
    table = stale(tables, seed=3)
    table[table <= -1e5] = 0.0
    scores, experience = with_reference(tables, table, TeacherTopK(k=k))
    origin = tables.rollout.origin.clone()
    origin[::3, 0], origin[1::3, 0] = Origin.TEACHER, Origin.DATA
    collected, entropy = (
        tables.taken(table.log_softmax(-1)),
        torch.ones(tables.ids.shape, dtype=torch.float64),
    )
    return scores, replace(
        experience,
        rollout=replace(tables.rollout, origin=origin, behavior_logp=collected - 0.1),
        collected_logp=collected,
        collected_entropy=entropy,
        teacher_entropy=entropy,
    )


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
    step(tables, composed[part[-1]], *seen(tables, k))


# numerics 11.24
@every
@pytest.mark.parametrize("what", ["responses", "horizons"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_rows_without_a_token_in_the_loss(tables, composed, part, what, all_of_them):
    """They change nothing beside others, though they hold what is not finite, and are 0 with a graph alone."""
    objective = composed[part[-1]]
    scores, experience = seen(tables)
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
        tables, objective, seen(tables)[0].rows(~out), rows.rows((~out).nonzero().flatten())
    )
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=1e-9)
