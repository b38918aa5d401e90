"""The toy experiment of Revisiting OPD: its gradients, its randomness, and what it must show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.toy import picture
from opd_lightning.toy.distil import (
    GammaExperiment,
    Measured,
    measure,
    output_gradients,
    surrogate,
    variance,
)
from opd_lightning.toy.summary import claims, late, of_task, summarise
from opd_lightning.toy.walk import TASKS, Policies, walk

SHORT = GammaExperiment(
    gammas=[0.0, 0.5, 1.0],
    seeds=[3],
    sigma_min=0.2,
    iterations=8,
    trajectories=8,
    micro_batches=4,
    horizon=5,
    lr=1e-3,
    teacher_iterations=3,
)


@pytest.fixture(autouse=True)
def float64():
    """Truth to 1e-9."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batch(policies=2, trajectories=8, horizon=5):
    """Return a student, a teacher, and walks of the student, one policy on each task."""
    student, teacher = (Policies.new(range(seed, seed + policies), 0.3) for seed in (0, 10))
    drawn = torch.randn(policies, trajectories, horizon, generator=torch.Generator().manual_seed(1))
    return student, teacher, walk(student, torch.arange(policies) % len(TASKS), drawn)


def scored(policies, walks):
    output = policies.output(policies.hidden(walks.states))
    return policies.log_prob(output, walks.steps.flatten(1)).view_as(walks.steps)


def test_log_density_is_the_normal_one():
    student, _, walks = batch()
    mean, sigma = student.normal(student.output(student.hidden(walks.states)))
    assert (sigma > 0.3).all()
    expected = torch.distributions.Normal(mean, sigma).log_prob(walks.steps.flatten(1))
    torch.testing.assert_close(scored(student, walks).flatten(1), expected, rtol=1e-12, atol=1e-12)


def test_walks_add_up():
    """The states are where the walk stands before each step, with its task and the time."""
    _, _, walks = batch(horizon=5)
    assert walks.positions[:, 0, 0].tolist() == [2.0, -2.0]
    torch.testing.assert_close(walks.positions.diff(dim=-1), walks.steps)
    states = walks.states.unflatten(1, (-1, 5))
    torch.testing.assert_close(states[..., 1], walks.positions[..., :-1])
    assert states[..., 0].unique(dim=1).tolist() == [[[0.0] * 5], [[1.0] * 5]]
    assert states[0, 0, :, 2].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_sigma_has_a_floor():
    """exp(output) above it, however sure the network is."""
    (student, *_), outputs = batch(), torch.tensor([[[5.0, 0.0], [5.0, -100.0]]])
    assert student.normal(outputs)[0].tolist() == [[5.0, 5.0]]
    assert student.normal(outputs)[1][0].tolist() == pytest.approx([1.3, 0.3])


def test_size_of_a_policy():
    assert sum(p.numel() for p in Policies.new([0], 0.1).parameters) == 4546


def test_output_gradients_are_autograds():
    """Of each micro-batch's own mean loss, by a backward pass for each."""
    student, teacher, walks = batch()
    gammas, parts = [0.25, 0.9], 4
    hidden = student.hidden(walks.states)
    output = student.output(hidden)
    output.retain_grad()
    target = scored(teacher, walks).detach()
    log_prob = student.log_prob(output, walks.steps.flatten(1)).view_as(walks.steps)
    surrogate(log_prob, target, gammas).sum().backward(retain_graph=True)
    found = output_gradients(hidden.detach(), output.grad, parts)
    for m, rows in enumerate(torch.arange(8).chunk(parts)):
        loss = surrogate(log_prob[:, rows], target[:, rows], gammas).sum()
        weight, bias = torch.autograd.grad(loss, (student.weights[-1], student.biases[-1]), retain_graph=True)
        expected = torch.cat((weight.flatten(1), bias.flatten(1)), -1)
        torch.testing.assert_close(found[:, m], expected, rtol=1e-9, atol=1e-9)


def test_variance_is_over_micro_batches():
    gradients = torch.tensor([[[1.0, 0.0, 7.0], [3.0, 4.0, 7.0]]])
    assert variance(gradients).item() == pytest.approx(1 + 4)  # mean (2, 2, 7): both 1 + 4 away


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_surrogate_follows_the_recursion(gamma):
    """Its gradient is the mean over walks of Sum_t G_t grad log S, with G_t = d_t + gamma G_{t+1} by a loop."""
    student, teacher, walks = batch()
    log_prob, target = scored(student, walks), scored(teacher, walks).detach()
    cost = (log_prob - target).detach()
    expected = torch.zeros(())
    for row in range(2):
        own = gamma if row else 0.7
        for n in range(8):
            to_go = 0.0
            for t in reversed(range(5)):
                to_go = cost[row, n, t].item() + own * to_go
                expected = expected + to_go * log_prob[row, n, t] / 8
    wanted = torch.autograd.grad(expected, student.parameters, retain_graph=True)
    found = torch.autograd.grad(surrogate(log_prob, target, [0.7, gamma]).sum(), student.parameters)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_seed_gives_its_numbers_again():
    first, again, other = (measure(replace(SHORT, seeds=[seed])) for seed in (3, 3, 4))
    for name in ("variance", "positions", "teacher_positions"):
        assert getattr(first, name).equal(getattr(again, name))
        assert not getattr(first, name).allclose(getattr(other, name))
    assert first.variance.shape == (1, 3, 8)
    assert first.positions.shape[:3] == (2, 1, 3)
    assert first.positions.shape[-1] == 6


def test_seeds_and_gammas_do_not_disturb_each_other():
    """A run's numbers are its own, whichever others are computed beside it."""
    alone = measure(replace(SHORT, gammas=[0.0, 1.0]))
    beside = measure(replace(SHORT, seeds=[9, 3, 8]))
    torch.testing.assert_close(beside.variance[1:2, [0, 2]], alone.variance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(beside.positions[:, 1:2, [0, 2]], alone.positions, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(beside.teacher_positions[:, 1:2], alone.teacher_positions)


def test_gamma_is_all_that_differs():
    """Students of a seed start alike and draw alike: almost the same gamma gives almost the same run."""
    found = measure(replace(SHORT, gammas=[0.5, 0.5 + 1e-9])).variance
    torch.testing.assert_close(found[:, 0], found[:, 1], rtol=1e-5, atol=0)


def made_up(curves):
    """Return measurements of one seed with these variances, all walks ending at the left target."""
    positions = torch.full((2, 1, len(curves), 4, 6), -3.0)
    return Measured(
        variance=torch.tensor([curves]), positions=positions, teacher_positions=positions[:, :, 0]
    )


def test_summary_by_hand():
    """Left walks are the odd updates; the last quarter counts; a ratio, an order, and where walks end."""
    settings = replace(SHORT, gammas=[0.0, 1.0], iterations=16)
    low = [9.0, 5.0] * 6 + [1.0, 8.0, 3.0, 8.0]
    high = [9.0, 70.0] * 6 + [10.0, 2.0, 30.0, 2.0]
    left, right = summarise(settings, made_up([low, high]))
    assert left["late_median_variance"] == [1.0, 10.0]  # torch's median is the lower of two
    assert right["late_median_variance"] == [8.0, 2.0]
    assert (left["ratio"], right["ratio"]) == (10.0, 0.25)
    assert (left["monotone"], right["monotone"]) == (True, False)
    assert left["largest_variance"] == [9.0, 30.0]
    assert left["largest_at"] == [1, 15]
    assert left["final_position"] == [-3.0, -3.0]
    said = dict(claims([left, right]))
    assert "in 1 of 2 cases" in said["later, a larger gamma has the larger variance"]
    assert "0.2 to 10.0x" in "".join(said.values())
    assert "1 of 2 cases, mean position at most 6.00 away" in said["gamma 0 reaches both targets in all runs"]


def test_a_run_that_left_the_numbers_is_said():
    """Not finite: null in the json, no ratio, not monotone."""
    left, _ = summarise(
        replace(SHORT, gammas=[0.0, 1.0]), made_up([[1.0] * 8, [1.0] * 6 + [float("nan")] * 2])
    )
    assert left["late_median_variance"] == [1.0, None]
    assert left["ratio"] is None
    assert left["monotone"] is False
    assert "inf" in "".join(found for _, found in claims([left]))


def test_visitation_counts_every_walk_in_reach():
    positions = torch.tensor([[0.1, 7.9], [0.1, 9.0], [-7.9, float("nan")], [0.1, 0.1]])
    seen = picture.visitation(positions)
    assert seen.shape == (picture.BINS, 2)
    assert seen.sum(0).tolist() == [1.0, 0.5]
    assert seen[picture.BINS // 2, 0] == 0.75
    assert seen[-1, 1] == 0.25


def test_running_median():
    """Deaf to single spikes, the first and the last entry included."""
    line = torch.arange(101.0)
    spiked = line.index_fill(0, torch.tensor([0, 50, 100]), 1e9)
    found = picture.running_median(spiked)
    assert found[20:80].tolist() == pytest.approx(line[20:80].tolist(), abs=1)
    assert found[[0, -1]].tolist() == pytest.approx([0, 100], abs=10)
    assert picture.running_median(torch.tensor([1.0])).tolist() == [1.0]


@pytest.mark.parametrize(
    ("gammas", "shown"), [([0, 0.25, 0.5, 0.75, 1], [0, 2, 4]), ([0, 1], [0, 1]), ([0, 0.1, 0.2], [0, 1, 2])]
)
def test_maps_show_three_gammas(gammas, shown):
    assert picture.shown_gammas(gammas) == shown


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gammas": [0.5]}, "gammas"),
        ({"gammas": [0.0, 1.5]}, "gammas"),
        ({"gammas": [1.0, 0.0]}, "gammas"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"sigma_min": 0}, "sigma_min"),
        ({"lr": float("nan")}, "lr"),
        ({"iterations": 7}, "iterations"),
        ({"horizon": 0}, "horizon"),
        ({"micro_batches": 3}, "micro_batches"),
        ({"micro_batches": 1}, "micro_batches"),
    ],
)
def test_refused_settings(change, field):
    with pytest.raises(ConfigError, match=f"^`{field}` must .*; "):
        replace(SHORT, **change)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_late_variance_rises_with_gamma():
    """Monotone, at least 5 times larger at gamma 1 than at gamma 0 on both tasks, and every walk at its target."""
    torch.set_default_dtype(torch.float32)
    gammas = [0.0, 0.25, 0.5, 0.75, 1.0]
    settings = GammaExperiment(
        gammas=gammas,
        seeds=[2026],
        sigma_min=0.2,
        iterations=1000,
        trajectories=64,
        micro_batches=8,
        horizon=20,
        lr=1e-3,
        teacher_iterations=400,
    )
    measured = measure(settings)
    for t, (task, row) in enumerate(zip(TASKS, summarise(settings, measured), strict=True)):
        medians = late(of_task(measured.variance[0], t))
        assert (medians.diff() > 0).all()
        assert medians[-1] >= 5 * medians[0]
        assert row["monotone"]
        assert row["ratio"] >= 5
        assert row["teacher_final_position"] == pytest.approx(task.target, abs=0.3)
        assert row["final_position"] == pytest.approx([task.target] * 5, abs=0.5)
