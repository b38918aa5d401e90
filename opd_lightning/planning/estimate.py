"""The whole estimate of a configuration in one call."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from opd_lightning.lora import Lora
from opd_lightning.objective import Objective
from opd_lightning.planning.memory import Memory, memory
from opd_lightning.planning.settings import Assumptions, Values, planned_run
from opd_lightning.protocols import RolloutSampler


def estimated_memory(
    values: Values,
    objective: Objective,
    rollout: RolloutSampler,
    optimizer: Callable[..., Optimizer],
    assumed: Assumptions,
    lora: Lora | None = None,
) -> Memory:
    """Return the bytes of one process by part (``parts``), and at the worst moment (``peak``): an estimate.

    See :func:`~opd_lightning.planning.settings.planned_run` for the arguments.

    Raises:
        ConfigError: a model's configuration cannot be read, or prompts that do not divide over the processes.
    """
    return memory(planned_run(values, objective, rollout, optimizer, assumed, lora=lora))
