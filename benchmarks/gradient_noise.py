"""How noisy is a method's gradient at the starting student, its schedules at half the run?

python benchmarks/gradient_noise.py experiment=esr experiment=tropd    # each argument is one row
"""

from __future__ import annotations

import sys

import torch
from hydra import compose, initialize_config_dir

from opd_lightning.building import run_from
from opd_lightning.commands import quiet
from opd_lightning.paths import CONF_DIR
from opd_lightning.world import World

PROGRESS = 0.5  # where a schedule has begun and not ended: at 0 TrOPD has prefixes alone


def gradients(overrides: list[str], collections: int) -> torch.Tensor:
    """Return the gradient of each optimizer step of some collections, all at the starting student: [step weights]."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("train", overrides)
    torch.manual_seed(0)
    run = run_from(config)
    student, objective, collector = run.module.student, run.module.objective, run.data.collector
    rows = []
    for number in range(collections):
        student.eval()
        steps, _ = collector.collect(student, number, progress=PROGRESS, version=0, world=World())
        student.train()
        for experience in steps:
            student.zero_grad()
            scores = student(
                experience.rollout.tokens, objective.want, experience.support_ids, experience.hidden
            )
            objective.loss(scores, experience, PROGRESS)[0].backward()
            rows.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    return torch.stack(rows)


def noise_to_signal(overrides: list[str], batches: int = 16) -> float:
    """Return tr Var(g) / |E g|^2 over ``batches`` optimizer steps, the signal corrected for its own noise."""
    quiet()
    found = gradients([*overrides, "collector.probe_rows=0"], collections=1)
    more = -(-batches // len(found))
    if more > 1:
        found = gradients([*overrides, "collector.probe_rows=0"], collections=more)[:batches]
    noise = found.var(0).sum()
    signal = found.mean(0).square().sum() - noise / len(found)
    return float(noise / signal.clamp(min=1e-12))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: noise/signal {noise_to_signal(argument.split()):.1f}", flush=True)
