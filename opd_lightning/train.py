"""``python -m opd_lightning.train``: distil a student from a teacher on the student's own rollouts."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from opd_lightning.building import KEYS, run_from, trainer_from
from opd_lightning.callbacks.history import EvaluationHistory
from opd_lightning.commands import (
    check_seed,
    command,
    git_commit,
    plain,
    quiet,
    refuse_unknown_keys,
)
from opd_lightning.errors import ConfigError, Stopped
from opd_lightning.export import save_student
from opd_lightning.launching import together
from opd_lightning.loggers import Continues
from opd_lightning.objective import Objective
from opd_lightning.processes import first_process, started_among_others
from opd_lightning.redaction import redacted
from opd_lightning.reporting import closing, log_settings, plan, summarise, teacher_accuracy
from opd_lightning.resume.files import written
from opd_lightning.resume.finding import Earlier, alone, differences, find, forget, refuse_another, way_on

log = logging.getLogger(__name__)


def say_unused_support(objective: Objective) -> None:
    """Say that no part of the loss reads the support; a full one is then not even collected."""
    if objective.support.needs.support and not objective.uses_support:
        name = type(objective.estimator).__name__
        use = "is left out" if objective.support.needs.full else "only feeds the diagnostics"
        log.info("the support %s: estimator %s does not use one", use, name)


def train(
    config: DictConfig, folder: Path, overrides: list[str], earlier: Earlier | None = None
) -> dict[str, Any]:
    """Run everything, or what is left of an earlier run, and return the summary.

    Raises:
        ConfigError: a configuration that cannot work.
        Stopped: the run was asked to stop and has written a checkpoint.
        ProcessLost: another process of the run is gone.
    """
    begun = time.perf_counter()
    refuse_unknown_keys(config, KEYS)
    check_seed(config.seed)
    L.seed_everything(config.seed, verbose=False)
    every = config.evaluation.every_steps
    history = EvaluationHistory(every)
    trainer = trainer_from(config, history, folder)
    run = run_from(config, folder)
    run.data.collector.check_world(trainer.world_size)  # before a child process starts
    checkpoint = None if earlier is None else earlier.checkpoint
    if earlier is not None:
        go_on(trainer, earlier, redacted(plain(config)), overrides)
    if trainer.is_global_zero:
        say_unused_support(run.module.objective)
        folder.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            written(folder / "config.yaml", OmegaConf.to_yaml(redacted(plain(config))))
        count = run.data.collector.micro_batches(trainer.world_size) or trainer.accumulate_grad_batches
        print(plan(config, run, folder, count, trainer.world_size), flush=True)
    with together(trainer, folder):
        if checkpoint is None:
            if run.data.validation is not None:
                trainer.validate(run.module, datamodule=run.data, verbose=False)
            log_settings(trainer, config, overrides, history.at.get(0, {}))
        trainer.fit(run.module, datamodule=run.data, ckpt_path=checkpoint, weights_only=True)
        run.data.collector.clock.switch(None)
        if run.data.validation is not None and trainer.global_step not in history.at:
            trainer.validate(run.module, datamodule=run.data, verbose=False)
        save_student(trainer, run.module, run.tokenizer, folder / "student")
    teacher = teacher_accuracy(run) if config.evaluation.teacher and trainer.is_global_zero else None
    summary = summarise(run, trainer, history, teacher) | {
        "seconds": round(time.perf_counter() - begun, 1),
        "overrides": overrides,
        "seed": config.seed,
        "git_commit": git_commit(),
    }
    if trainer.is_global_zero:
        written(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        print(closing(summary, folder), flush=True)
    return summary


def go_on(trainer: L.Trainer, earlier: Earlier, config: dict[str, Any], overrides: list[str]) -> None:
    """Cut the run's logs at its checkpoint, say where it goes on, and write that down."""
    for logger in trainer.loggers:
        if isinstance(logger, Continues):
            logger.go_on(earlier.step)
    if not trainer.is_global_zero:
        return
    others = differences(earlier.folder, config)
    if others:
        total = "; schedules are those of the new total" if "trainer.max_steps" in others else ""
        log.warning("the run goes on with other settings than it began with: %s%s", ", ".join(others), total)
    where = "from its beginning" if earlier.checkpoint is None else f"from {earlier.checkpoint.name}"
    print(f"resumed   {earlier.folder} {where}", flush=True)
    line = {"step": earlier.step, "overrides": overrides, "git_commit": git_commit()}
    with (earlier.folder / "resumed.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def earlier_run(config: DictConfig) -> Earlier | None:
    """Return the run that ``resume`` names, and have everything that asks Hydra for the run's folder get its."""
    hydra_config = HydraConfig.get()
    folder, multirun = Path(hydra_config.runtime.output_dir), hydra_config.mode == RunMode.MULTIRUN
    given = any(text.startswith(("hydra.run.dir=", "hydra.sweep.")) for text in hydra_config.overrides.hydra)
    # The folders that the command names by date and time, and a grid's job below them by its overrides.
    depth = 0 if given else 3 if multirun else 2
    earlier = find(config.resume, redacted(plain(config)), folder, depth)
    if earlier is not None and earlier.folder.resolve() != folder.resolve():
        settings: Any = HydraConfig.instance().cfg
        with read_write(settings.hydra):
            settings.hydra.runtime.output_dir = str(earlier.folder.resolve())
            settings.hydra.run.dir = str(earlier.folder.resolve())
        with contextlib.suppress(OSError):
            folder.rmdir()  # Hydra has made it, empty
    return earlier


def refuse_processes(config: DictConfig) -> None:
    """Refuse a multirun whose jobs are several processes, started by Lightning or by another launcher.

    Raises:
        ConfigError: it is.
    """
    remedy = "run each job by its own command (docs/scale.md has a loop and a SLURM array)"
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    if devices not in (1, "1") or nodes != 1:
        raise ConfigError(
            f"`trainer.devices` must be 1 in a multirun, got {devices}: a process-launching strategy would rerun the "
            f"whole sweep in each child; use trainer.devices=1, or {remedy}"
        )
    if started_among_others():
        raise ConfigError(
            "`hydra.mode` must be RUN in a process of torchrun or srun, got MULTIRUN: each of them would run the whole "
            f"sweep; start the sweep once by python, or {remedy}"
        )


@command("train")
def main(config: DictConfig) -> float | None:
    """Command line entry; returns the accuracy after training for Hydra sweepers."""
    quiet()
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        refuse_processes(config)
    try:
        return launched(config, redacted(list(hydra_config.overrides.task)))
    finally:
        forget()


def launched(config: DictConfig, overrides: list[str]) -> float | None:
    """Begin a run or go on with one, in its folder, and return the accuracy at its end."""
    earlier = earlier_run(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if earlier is not None and earlier.finished:
        summary = json.loads((folder / "summary.json").read_text())
        print(f"the run in {folder} is finished\n{closing(summary, folder)}", flush=True)
        return summary["accuracy_after"]
    with alone(folder) if first_process() else contextlib.nullcontext():
        if earlier is None and first_process():
            refuse_another(folder)
        try:
            return train(config, folder, overrides, earlier)["accuracy_after"]
        except Stopped as stop:
            if first_process():
                print(f"stopped {stop.reason}; {way_on(folder)}", file=sys.stderr, flush=True)
            # The first one's watcher would take another that leaves earlier by this code for lost.
            sys.exit(stop.code if first_process() else 0)


if __name__ == "__main__":
    main()
