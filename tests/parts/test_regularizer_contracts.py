"""What every regularizer must keep, read off its yaml: a new file is tested the moment it exists."""

from dataclasses import replace
from itertools import combinations, permutations

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tabular import World as Tables
from tabular import stale, with_reference

from opd_lightning.building import objective_from
from opd_lightning.estimator.token import Token
from opd_lightning.objective import Objective
from opd_lightning.paths import CONF_DIR
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Needs, Origin, TokenLoss, Want
from opd_lightning.world import World

NAMES = sorted(file.stem for file in (CONF_DIR / "regularizer").glob("*.yaml"))
every = pytest.mark.parametrize("name", NAMES)


def part_of(name):
    """The part as its yaml has it."""
    content = yaml.safe_load((CONF_DIR / "regularizer" / f"{name}.yaml").read_text())
    return instantiate(content[name], _convert_="all")


def entropy(logits):
    logp = logits.detach().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@pytest.fixture
def tables():
    return Tables(4, 3)


def everything(tables):
    """Scores and experience that hold all that a part can ask for; some tokens are the teacher's or the data's."""
    table = stale(tables, seed=3)
    scores, experience = with_reference(tables, table, TeacherTopK(k=3))
    origin = tables.rollout.origin.clone()
    origin[::3, 0], origin[1::3, 0] = Origin.TEACHER, Origin.DATA
    collected = tables.taken(table.log_softmax(-1))
    rollout = replace(tables.rollout, origin=origin, behavior_logp=collected - 0.1)
    experience = replace(
        experience,
        rollout=rollout,
        collected_logp=collected,
        collected_entropy=entropy(table)[tables.rows],
        teacher_entropy=entropy(tables.teacher)[tables.rows],
    )
    return replace(scores, entropy=entropy(tables.theta)[tables.rows]), experience


def objective(*names):
    """Those parts behind the token estimator, which has everything that a part can build on."""
    return Objective(
        estimator=Token(reward=LogRatio()),
        support=TeacherTopK(k=3),
        reduction=TokenMean(),
        regularizers={name: part_of(name) for name in names},
    )


def lost(tables, *names, empty=False):
    """The loss per token and the step's loss, for responses that are all there or all padding."""
    scores, experience = everything(tables)
    if empty:
        nowhere = torch.zeros_like(tables.mask)
        valid = torch.zeros_like(experience.support_valid)
        rollout = replace(experience.rollout, mask=nowhere)
        experience = replace(experience, rollout=rollout, support_valid=valid)
    parts = objective(*names)
    experience = parts.finish(experience, World())
    return parts.token_loss(scores, experience, 0.5), parts.loss(scores, experience, 0.5)


@every
def test_says_what_it_needs_and_wants(name):
    part = part_of(name)
    assert isinstance(part.needs, Needs)
    assert isinstance(part.want, Want)
    alone = objective()
    assert objective(name).needs == alone.needs | part.needs
    assert objective(name).want.taken == (alone.want.taken or part.want.taken)


@every
def test_a_call_keeps_shapes_and_earlier_metrics(name, tables):
    plain, _ = lost(tables)
    loss, _ = lost(tables, name)
    assert isinstance(loss, TokenLoss)
    assert loss.value.shape == loss.weight.shape == loss.advantage.shape == tables.ids.shape
    assert not loss.weight.requires_grad
    assert not loss.advantage.requires_grad
    assert loss.value.dtype == plain.value.dtype == torch.float64
    assert loss.metrics.keys() > plain.metrics.keys()
    for key, metric in plain.metrics.items():
        assert torch.equal(loss.metrics[key], metric)


@every
def test_metrics_and_gradient_are_finite(name, tables):
    loss, (value, metrics) = lost(tables, name)
    for key, metric in loss.metrics.items():
        assert metric.shape == tables.ids.shape, key
        assert metric.isfinite().all(), key
        assert not metric.requires_grad, key
    assert all(metric.isfinite() for metric in metrics.values())
    assert tables.gradient(value).isfinite().all()


@every
def test_changes_the_loss(name, tables):
    """The settings of the yaml are at work: the gradient is another than the estimator's."""
    plain, changed = (tables.gradient(lost(tables, *names)[1][0]) for names in ((), (name,)))
    assert (plain - changed).abs().max() > 1e-6


# numerics 11.24
@every
def test_nothing_in_the_loss_is_0_with_a_graph(name, tables):
    _, (value, _) = lost(tables, name, empty=True)
    assert value.item() == 0.0
    assert not tables.gradient(value).any()


@pytest.mark.parametrize(("first", "second"), list(permutations(NAMES, 2)), ids="-".join)
def test_two_work_after_each_other(first, second, tables):
    loss, (value, _) = lost(tables, first, second)
    alone = (lost(tables, name)[0].metrics.keys() for name in (first, second))
    assert loss.metrics.keys() == set().union(*alone)
    assert tables.gradient(value).isfinite().all()


@pytest.fixture(scope="module")
def composed():
    """Compose the command's own configuration."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield lambda *overrides: objective_from(compose("train", list(overrides)))


@pytest.mark.parametrize(("first", "second"), list(combinations(NAMES, 2)), ids="-".join)
def test_two_yamls_compose_and_both_are_there(first, second, composed):
    parts = composed("estimator=token", f"regularizer=[{second},{first}]").regularizers
    assert list(parts) == [second, first]
    assert parts[first] == part_of(first)
    assert parts[second] == part_of(second)
