"""``python -m opd_lightning.train``: distil a student from a teacher on the student's own rollouts."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from opd_lightning.assemble import CollectorSettings, Run, assemble
from opd_lightning.buffer import check_one_count
from opd_lightning.callbacks.history import EvaluationHistory
from opd_lightning.callbacks.stopping import Stopped
from opd_lightning.checks.machine import devices as check_devices
from opd_lightning.checks.run import starting
from opd_lightning.commands import (
    build,
    check_seed,
    command,
    git_commit,
    plain,
    quiet,
    refuse_unknown_keys,
    refused,
)
from opd_lightning.errors import ConfigError, require
from opd_lightning.export import save_student
from opd_lightning.loggers import Continues
from opd_lightning.lora import Lora
from opd_lightning.objective import Objective
from opd_lightning.processes import first_process, started_among_others
from opd_lightning.redaction import redacted
from opd_lightning.reporting import closing, log_settings, plan, summarise, teacher_accuracy
from opd_lightning.resume.files import WholeFiles, written
from opd_lightning.resume.finding import Earlier, alone, differences, find, forget, refuse_another, way_on

log = logging.getLogger(__name__)

KEYS = {
    *("task", "student", "teacher", "engine", "rollout", "support", "estimator", "divergence", "reward"),
    *("regularizer", "mask", "reduction", "collector", "evaluation", "optimizer", "scheduler", "trainer"),
    *("strategy", "logger", "callbacks", "reference", "seed", "resume", "planning"),
    *("reporting", "reporting.peak_tflops"),
    *("student.path", "student.dtype", "student.head_scratch_mb", "student.scoring_temperature"),
    *("student.layout", "student.compile", "student.lora", "student.trust_remote_code"),
    "student.gradient_checkpointing",
    *("evaluation.split", "evaluation.every_steps", "evaluation.settings", "evaluation.teacher"),
    *(f"collector.{field.name}" for field in fields(CollectorSettings)),
}


def objective_from(config: DictConfig) -> Objective:
    """Build the objective's parts and check them against each other."""
    return Objective(
        estimator=build(config.estimator),
        support=build(config.support),
        reduction=build(config.reduction),
        regularizers=_listed(config, "regularizer"),
        masks=_listed(config, "mask"),
    )


def _listed(config: DictConfig, group: str) -> dict[str, Any]:
    """Build the parts of a list; a preset's settings of one that the command line took out are left out."""
    parts = config.get(group) or {}
    for name in parts:
        if "_target_" not in parts[name]:
            log.info("%s.%s is not in the list %s=[...]: its settings are left out", group, name, group)
    return {name: build(part) for name, part in parts.items() if "_target_" in part}


def run_from(config: DictConfig, folder: Path | None = None) -> Run:
    """Build a run: cheap parts, checks where there is a ``folder`` for it, models.

    Raises:
        ConfigError: a configuration that cannot work.
    """
    parts = {name: make() for name, make in makers(config).items()}
    if folder is not None:
        refuse_early(config, parts, folder)
    return assemble(**parts)


def makers(config: DictConfig) -> dict[str, Callable[[], Any]]:
    """Return how each argument of :func:`~opd_lightning.assemble.assemble` is built, no model among them."""
    return {
        "objective": lambda: objective_from(config),
        "rollout": lambda: build(config.rollout),
        "engine": lambda: build(config.engine),
        "collector": lambda: CollectorSettings(**plain(config.collector)),
        "evaluation": lambda: build(config.evaluation.settings),
        "optimizer": lambda: optimizer_from(config),
        "scheduler": lambda: build(config.scheduler),
        "reference": lambda: build(config.reference),
        "task": lambda: build(config.task),
        "teacher": lambda: build(config.teacher),
        "student_path": lambda: config.student.path,
        "student_dtype": lambda: config.student.dtype,
        "head_scratch_mb": lambda: config.student.head_scratch_mb,
        "temperature": lambda: config.student.scoring_temperature,
        "layout": lambda: config.student.layout,
        "compiled": lambda: config.student.compile,
        "lora": lambda: lora_from(config),
        "split": lambda: config.evaluation.split,
        "seed": lambda: config.seed,
        "peak_tflops": lambda: config.reporting.peak_tflops,
        "gradient_checkpointing": lambda: config.student.gradient_checkpointing,
        "trust_remote_code": lambda: config.student.trust_remote_code,
    }


def refuse_early(config: DictConfig, parts: dict[str, Any], folder: Path) -> None:
    """Look for what would go wrong later, before a model is loaded; warnings are a line each.

    Raises:
        ConfigError: there is something.
    """
    findings = starting(parts | {"folder": folder, "trainer": plain(config.trainer), "values": plain(config)})
    for finding in findings:
        if finding.level == "error":
            raise ConfigError(finding.line)
        if finding.level == "warning" and first_process():
            print(f"warning   {finding.line}", flush=True)


def lora_from(config: DictConfig) -> Lora | None:
    """Build the student's adapters, None for none."""
    if config.student.lora is None:
        return None
    lora = build(config.student.lora)
    remedy = "use student/lora=default, and student.lora.rank=8 for one of its values"
    require(isinstance(lora, Lora), "student.lora", "be null or an option of its own", lora, remedy)
    assert isinstance(lora, Lora)
    return lora


def optimizer_from(config: DictConfig) -> Any:
    """Build the optimizer's constructor, tried on two parameters so that a bad number fails before models load."""
    make = build(config.optimizer)
    try:
        make([torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1, 1))])
    except (TypeError, ValueError) as error:
        raise refused(config.optimizer, error) from error
    return make


def say_unused_support(objective: Objective) -> None:
    """Say that no part of the loss reads the support; a full one is then not even collected."""
    if objective.support.needs.support and not objective.uses_support:
        name = type(objective.estimator).__name__
        use = "is left out" if objective.support.needs.full else "only feeds the diagnostics"
        log.info("the support %s: estimator %s does not use one", use, name)


def trainer_from(config: DictConfig, history: EvaluationHistory, folder: Path) -> L.Trainer:
    """Build Lightning's trainer with its loggers, callbacks, strategy and evaluation interval."""
    settings = plain(config.trainer)
    list(check_devices(settings))  # Lightning says it without the remedy
    planned, accumulate = settings["max_steps"], settings["accumulate_grad_batches"]
    require(
        isinstance(planned, int) and planned >= 1,
        "trainer.max_steps",
        "be at least 1 optimizer step",
        planned,
        "use 320",
    )
    require(
        isinstance(accumulate, int) and accumulate >= 1,
        "trainer.accumulate_grad_batches",
        "be at least 1",
        accumulate,
        "use 1 for no accumulation",
    )
    check_one_count(accumulate, config.collector.micro_batch_tokens)
    known = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
    accelerator = settings["accelerator"]
    require(
        accelerator in known,
        "trainer.accelerator",
        f"be one of {', '.join(known)}",
        accelerator,
        "use cpu or gpu",
    )
    # Lightning's other precisions cast the batches too, which are frozen values.
    precision = str(settings["precision"])
    require(
        precision in ("32", "32-true", "16-mixed", "bf16-mixed"),
        "trainer.precision",
        "be 32-true, bf16-mixed or 16-mixed",
        precision,
        "use 32-true with student.dtype=bfloat16 to hold the weights themselves in bfloat16",
    )
    every = config.evaluation.every_steps
    require(
        every is None or (isinstance(every, int) and every >= 1),
        "evaluation.every_steps",
        "be at least 1 optimizer step",
        every,
        "use null to evaluate before and after training only",
    )
    evaluates = every is not None and every < planned
    callbacks = [build(part) for name, part in (config.get("callbacks") or {}).items()]
    if not settings["enable_progress_bar"]:
        callbacks = [c for c in callbacks if not isinstance(c, L.pytorch.callbacks.ProgressBar)]
    return build(
        config.trainer,
        strategy=build(config.strategy) if "_target_" in config.strategy else config.strategy.name,
        logger=[build(part) for part in (config.get("logger") or {}).values()],
        callbacks=[*callbacks, history],
        plugins=[WholeFiles(), *(build(part) for part in config.trainer.get("plugins") or [])],
        default_root_dir=str(folder),
        val_check_interval=every * accumulate if evaluates else planned * accumulate,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
    )


def train(
    config: DictConfig, folder: Path, overrides: list[str], earlier: Earlier | None = None
) -> dict[str, Any]:
    """Run everything, or what is left of an earlier run, and return the summary.

    Raises:
        ConfigError: a configuration that cannot work.
        Stopped: the run was asked to stop and has written a checkpoint.
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
        log.warning("the run goes on with other settings than it began with: %s", ", ".join(others))
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
            sys.exit(stop.code)


if __name__ == "__main__":
    main()
