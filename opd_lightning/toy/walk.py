"""A walk on a line: two tasks, small Gaussian policies, and a REINFORCE teacher for each task.

The state is (task, position, t / horizon), the action a step on the line: s_{t+1} = s_t + step. Policies are
kept as stacks of independent networks, so that all seeds and all gammas take one matrix product together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.functional.returns import discounted_return
from opd_lightning.seeds import mix

WIDTHS = (3, 64, 64, 2)  # 4,546 parameters; the paper says about 4K
TEACHER_TRAJECTORIES, TEACHER_LR = 256, 3e-3


@dataclass(frozen=True, kw_only=True)
class Task:
    """Walk from ``start`` to ``target`` and stay there."""

    name: str
    start: float
    target: float


TASKS = (Task(name="left", start=2.0, target=-3.0), Task(name="right", start=-2.0, target=3.0))


@dataclass(frozen=True, kw_only=True)
class Policies:
    """A stack of independent policies N(mean, sigma), tanh networks with sigma = exp(output) + sigma_min.

    The paper leaves open how sigma comes about; the floor keeps a finished teacher's density, and with it the
    whole experiment, finite.

    Attributes:
        weights: of each layer, (policies, inputs, outputs).
        biases: of each layer, (policies, 1, outputs).
        sigma_min: what sigma cannot fall below, in units of the line.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    sigma_min: float

    @classmethod
    def new(cls, seeds: Sequence[int], sigma_min: float) -> Policies:
        """Return a new policy for each seed, uniform in plus or minus 1/sqrt(inputs)."""
        draws = [_uniform(seed) for seed in seeds]
        layers = [torch.stack(same) for same in zip(*draws, strict=True)]
        layers = [layer.requires_grad_() for layer in layers]
        return cls(weights=tuple(layers[0::2]), biases=tuple(layers[1::2]), sigma_min=sigma_min)

    @property
    def parameters(self) -> list[Tensor]:
        """All weights and biases."""
        return [*self.weights, *self.biases]

    def select(self, rows: Sequence[int]) -> Policies:
        """Return the policies of these rows, detached."""
        pick = torch.tensor(list(rows))
        weights, biases = ([p.detach()[pick] for p in group] for group in (self.weights, self.biases))
        return Policies(weights=tuple(weights), biases=tuple(biases), sigma_min=self.sigma_min)

    def hidden(self, states: Float[Tensor, "policies n 3"]) -> Float[Tensor, "policies n width"]:
        """Return the input of the output layer."""
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            states = torch.baddbmm(bias, states, weight).tanh()
        return states

    def output(self, hidden: Float[Tensor, "policies n width"]) -> Float[Tensor, "policies n 2"]:
        """Return the output layer's values: the mean, and the logarithm of sigma - sigma_min."""
        return torch.baddbmm(self.biases[-1], hidden, self.weights[-1])

    def normal(self, output: Float[Tensor, "*n 2"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """Return mean and sigma of the step."""
        return output[..., 0], output[..., 1].exp() + self.sigma_min

    def log_prob(
        self, output: Float[Tensor, "policies n 2"], steps: Float[Tensor, "policies n"]
    ) -> Float[Tensor, "policies n"]:
        """Return the log density of ``steps``."""
        mean, sigma = self.normal(output)
        return -0.5 * ((steps - mean) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)


def _uniform(seed: int) -> list[Tensor]:
    """Draw one network's weight and bias, layer after layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for inputs, outputs in pairwise(WIDTHS):
        for rows in (inputs, 1):
            layers.append((2 * torch.rand(rows, outputs, generator=generator) - 1) / math.sqrt(inputs))
    return layers


@dataclass(frozen=True, kw_only=True)
class Walks:
    """Trajectories of a stack of policies.

    Attributes:
        positions: before the first step and after each, (policies, trajectories, horizon + 1).
        steps: what was drawn, (policies, trajectories, horizon).
        states: inputs of the network, (policies, trajectories * horizon, 3), time fastest.
    """

    positions: Tensor
    steps: Tensor
    states: Tensor


@torch.no_grad()
def walk(
    policies: Policies, tasks: Int[Tensor, " policies"], noise: Float[Tensor, "policies n horizon"]
) -> Walks:
    """Let each policy walk its task, with standard normal ``noise`` for the steps."""
    starts = torch.tensor([task.start for task in TASKS], dtype=noise.dtype)[tasks]
    horizon = noise.shape[-1]
    position = starts[:, None].expand(noise.shape[:-1])
    kind = tasks.to(noise.dtype)[:, None].expand_as(position)
    positions, steps, states = [position], [], []
    for t in range(horizon):
        states.append(torch.stack((kind, position, torch.full_like(position, t / horizon)), -1))
        mean, sigma = policies.normal(policies.output(policies.hidden(states[-1])))
        steps.append(mean + sigma * noise[..., t])
        position = position + steps[-1]
        positions.append(position)
    return Walks(
        positions=torch.stack(positions, -1),
        steps=torch.stack(steps, -1),
        states=torch.stack(states, -2).flatten(1, 2),
    )


def generators(seeds: Sequence[int], purpose: str) -> list[torch.Generator]:
    """Return a generator for each seed, of its own for each purpose."""
    return [torch.Generator().manual_seed(mix(seed, purpose)) for seed in seeds]


def noise(own: Sequence[torch.Generator], trajectories: int, horizon: int) -> Float[Tensor, "seeds n t"]:
    """Draw standard normal numbers, each seed's from its own generator."""
    return torch.stack([torch.randn(trajectories, horizon, generator=one) for one in own])


def teachers(seeds: Sequence[int], sigma_min: float, horizon: int, iterations: int) -> Policies:
    """Train a teacher for each seed and task by REINFORCE; rows are seed by seed, left then right.

    The reward is -abs(s_{t+1} - target); the return to go is standardised at each time over the trajectories,
    which is all the baseline that these tasks need.
    """
    names = [f"teacher, {task.name}" for task in TASKS]
    policies = Policies.new([mix(seed, name, "weights") for seed in seeds for name in names], sigma_min)
    own = [one for seed in seeds for name in names for one in generators([seed], name)]
    tasks = torch.arange(len(TASKS)).repeat(len(seeds))
    targets = torch.tensor([task.target for task in TASKS])[tasks][:, None, None]
    optimizer = torch.optim.Adam(policies.parameters, lr=TEACHER_LR)
    for _ in range(iterations):
        walks = walk(policies, tasks, noise(own, TEACHER_TRAJECTORIES, horizon))
        reward = -(walks.positions[..., 1:] - targets).abs()
        to_go = discounted_return(reward, torch.ones_like(reward, dtype=torch.bool), 1.0)
        advantage = (to_go - to_go.mean(1, keepdim=True)) / (to_go.std(1, keepdim=True) + 1e-8)
        output = policies.output(policies.hidden(walks.states))
        log_prob = policies.log_prob(output, walks.steps.flatten(1))
        loss = -(advantage.flatten(1) * log_prob).sum() / TEACHER_TRAJECTORIES
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policies.select(range(len(tasks)))
