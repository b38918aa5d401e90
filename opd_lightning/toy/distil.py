"""One student distilled from two teachers by the score-function gradient with discount gamma, and its variance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import require
from opd_lightning.functional.returns import discounted_return
from opd_lightning.seeds import mix
from opd_lightning.toy.walk import TASKS, Policies, Walks, generators, noise, teachers, walk

VISITORS = 512  # trajectories of each finished student, for the maps and the final positions


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class GammaExperiment:
    """Settings of the experiment; Revisiting OPD (arXiv 2603.25562), except where ``conf/toy_gamma.yaml`` says ours.

    Attributes:
        gammas: discounts to compare, increasing.
        seeds: runs of the whole experiment, teachers included.
        sigma_min: floor of every policy's standard deviation, in units of the line.
        iterations: student updates; odd ones walk left, even ones right.
        trajectories: walks of an update.
        micro_batches: equal parts of an update over which the variance is taken.
        horizon: steps of a walk.
        lr: of the student's Adam.
        teacher_iterations: REINFORCE updates of each teacher.

    Raises:
        ConfigError: a value out of its range, or trajectories that the micro-batches do not divide.
    """

    gammas: Sequence[float]
    seeds: Sequence[int]
    sigma_min: float
    iterations: int
    trajectories: int
    micro_batches: int
    horizon: int
    lr: float
    teacher_iterations: int

    def __post_init__(self) -> None:
        gammas, seeds = self.gammas, self.seeds
        listed = isinstance(gammas, Sequence) and not isinstance(gammas, str) and len(gammas) > 1
        inside = listed and all(_number(g) and 0 <= g <= 1 for g in gammas)
        rising = inside and all(a < b for a, b in pairwise(gammas))
        require(rising, "gammas", "list at least two increasing numbers in [0, 1]", gammas, "use [0,1]")
        listed = isinstance(seeds, Sequence) and not isinstance(seeds, str) and len(seeds) > 0
        whole = listed and all(_whole(s, 0) and s < 2**32 for s in seeds) and len(set(seeds)) == len(seeds)
        require(whole, "seeds", "list different whole numbers in [0, 2**32)", seeds, "use [42]")
        for name in ("sigma_min", "lr"):
            value = getattr(self, name)
            require(_number(value) and 0 < value < float("inf"), name, "be above 0", value, "raise it")
        least = {
            "iterations": 8,
            "trajectories": 2,
            "micro_batches": 2,
            "horizon": 1,
            "teacher_iterations": 0,
        }
        for name, lowest in least.items():
            value = getattr(self, name)
            condition = f"be a whole number of at least {lowest}"
            require(_whole(value, lowest), name, condition, value, f"use {lowest} or more")
        even = self.trajectories % self.micro_batches == 0
        condition = f"divide the {self.trajectories} trajectories"
        require(even, "micro_batches", condition, self.micro_batches, "change one of them")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an experiment measured.

    Attributes:
        variance: of the output layer's gradient at each update, (seeds, gammas, iterations).
        positions: of the finished students' walks, (tasks, seeds, gammas, walks, horizon + 1).
        teacher_positions: of the teachers' walks, each on its own task, (tasks, seeds, walks, horizon + 1).
    """

    variance: Tensor
    positions: Tensor
    teacher_positions: Tensor


def surrogate(
    student: Float[Tensor, "policies n horizon"],
    teacher: Float[Tensor, "policies n horizon"],
    gammas: Sequence[float],
) -> Float[Tensor, " policies"]:
    """Return each policy's loss, the mean over walks of Sum_t sg[G_t] log S(step_t).

    G_t = d_t + gamma G_{t+1} with d_t = log S(step_t) - log T(step_t): Revisiting OPD, section 2.

    Args:
        student: log densities of the student's own steps.
        teacher: the teacher's of the same steps.
        gammas: of each policy, repeated for as many rows as there are.
    """
    cost = student.detach() - teacher
    rows = cost.unflatten(0, (-1, len(gammas)))
    mask = torch.ones_like(rows[:, 0], dtype=torch.bool)
    returns = [discounted_return(rows[:, i], mask, gamma) for i, gamma in enumerate(gammas)]
    return (torch.stack(returns, 1).flatten(0, 1) * student).sum(-1).mean(-1)


def output_gradients(
    hidden: Float[Tensor, "policies n width"], slope: Float[Tensor, "policies n 2"], micro_batches: int
) -> Float[Tensor, "policies micro_batches parameters"]:
    """Return the gradient of each micro-batch's mean loss with respect to the output layer.

    The layer is linear, so that the gradient is input times slope, summed over the micro-batch: one product
    for all of them in place of a backward pass each. The weight's entries come before the bias's.

    Args:
        hidden: inputs of the layer, micro-batch after micro-batch.
        slope: derivative of the mean loss over all trajectories by the layer's output.
        micro_batches: equal parts of ``n``.
    """
    with_bias = torch.cat((hidden, torch.ones_like(hidden[..., :1])), -1)
    parts = [x.unflatten(1, (micro_batches, -1)) for x in (with_bias, slope)]
    # A micro-batch's mean has a denominator that is smaller by their number.
    return micro_batches * torch.einsum("pmnh,pmno->pmho", *parts).flatten(2)


def variance(gradients: Float[Tensor, "*p micro_batches parameters"]) -> Float[Tensor, "*p"]:
    """Return (1/M) Sum_m ||g_m - mean g||^2."""
    centred = gradients - gradients.mean(-2, keepdim=True)
    return centred.square().sum(-1).mean(-1)


def measure(
    settings: GammaExperiment, report: Callable[[int, Tensor], None] = lambda iteration, variances: None
) -> Measured:
    """Train the teachers and a student for each seed and gamma; return the variances and the final walks.

    Students of one seed start from the same weights and draw the same random numbers, so that gamma is all
    that differs between them.

    Args:
        settings: of the experiment.
        report: called after each update with its number, from 1, and its variances (seeds, gammas).
    """
    seeds, gammas = settings.seeds, settings.gammas
    guides = teachers(seeds, settings.sigma_min, settings.horizon, settings.teacher_iterations)
    rows = range(len(seeds))
    guide = [
        guides.select([seed * len(TASKS) + task for seed in rows for _ in gammas])
        for task in range(len(TASKS))
    ]
    weights = [mix(seed, "student", "weights") for seed in seeds for _ in gammas]
    student = Policies.new(weights, settings.sigma_min)
    optimizer = torch.optim.Adam(student.parameters, lr=settings.lr)
    own, measured = generators(seeds, "student"), []
    for iteration in range(1, settings.iterations + 1):
        task = (iteration - 1) % len(TASKS)
        drawn = noise(own, settings.trajectories, settings.horizon).repeat_interleave(len(gammas), 0)
        walks = walk(student, torch.full((len(weights),), task), drawn)
        measured.append(_update(student, guide[task], walks, settings, optimizer))
        report(iteration, measured[-1])
    return Measured(
        variance=torch.stack(measured, -1),
        positions=_visits(student, settings, "students").unflatten(1, (len(seeds), len(gammas))),
        teacher_positions=torch.stack(
            [_visits(one, settings, "teachers")[task] for task, one in enumerate(guide)]
        )[:, :: len(gammas)],
    )


def _update(
    student: Policies,
    teacher: Policies,
    walks: Walks,
    settings: GammaExperiment,
    optimizer: torch.optim.Optimizer,
) -> Float[Tensor, "seeds gammas"]:
    """Take one optimizer step and return the variance of its gradient."""
    steps = walks.steps.flatten(1)
    with torch.no_grad():
        target = teacher.log_prob(teacher.output(teacher.hidden(walks.states)), steps)
    hidden = student.hidden(walks.states)
    output = student.output(hidden)
    output.retain_grad()
    loss = surrogate(
        student.log_prob(output, steps).view_as(walks.steps), target.view_as(walks.steps), settings.gammas
    )
    optimizer.zero_grad()
    loss.sum().backward()  # policies share nothing: each gets the gradient of its own loss
    optimizer.step()
    assert output.grad is not None
    gradients = output_gradients(hidden.detach(), output.grad, settings.micro_batches)
    return variance(gradients).unflatten(0, (-1, len(settings.gammas)))


def _visits(policies: Policies, settings: GammaExperiment, who: str) -> Float[Tensor, "tasks policies n t"]:
    """Return the positions of fresh walks of every policy on every task."""
    seeds = settings.seeds
    many = len(policies.weights[0]) // len(seeds)
    drawn = noise(generators(seeds, f"visits of {who}"), VISITORS, settings.horizon)
    rows = torch.arange(len(seeds)).repeat_interleave(many)
    return torch.stack(
        [walk(policies, torch.full_like(rows, task), drawn[rows]).positions for task in range(len(TASKS))]
    )
