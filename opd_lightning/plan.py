"""``python -m opd_lightning.plan``: what a run of ``train`` with the same settings would cost, before it starts."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from opd_lightning.building import KEYS, lora_from, objective_from, optimizer_from
from opd_lightning.commands import build, command, quiet, refuse_unknown_keys
from opd_lightning.planning.cost import Cost, cost
from opd_lightning.planning.memory import Memory, memory
from opd_lightning.planning.report import compared, report
from opd_lightning.reporting import assumptions, peak_of, planned


def estimate(config: DictConfig) -> str:
    """Return the estimate of a configuration of ``train`` as text; models' configurations alone are read.

    Raises:
        ConfigError: a configuration that cannot work, as far as it is looked at.
    """
    refuse_unknown_keys(config, KEYS)
    objective, rollout = objective_from(config), build(config.rollout)
    run = planned(config, objective, rollout, optimizer_from(config), lora_from(config))
    assumed, peak = assumptions(config), peak_of(config)

    def at(processes: int) -> tuple[Memory, Cost]:
        other = replace(run, processes=processes)
        return memory(other), cost(other, peak, assumed.utilisation)

    return report(run, memory(run), cost(run, peak, assumed.utilisation), assumed, peak, compared(run, at))


@command("train")
def main(config: DictConfig) -> None:
    """Command line entry; leaves no run folder behind."""
    quiet()
    try:
        print(estimate(config), flush=True)
    finally:
        folder = Path(HydraConfig.get().runtime.output_dir)
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):  # it holds something, and so it is not ours
                empty.rmdir()


if __name__ == "__main__":
    main()
