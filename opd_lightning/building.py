"""From the configuration of a run to its parts and its trainer; the commands that need a run share it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from opd_lightning.assemble import CollectorSettings, Run, assemble
from opd_lightning.buffer import check_one_count
from opd_lightning.callbacks.history import EvaluationHistory
from opd_lightning.checks.machine import devices as check_devices
from opd_lightning.checks.run import starting
from opd_lightning.commands import build, plain, refused
from opd_lightning.errors import ConfigError, require
from opd_lightning.lora import Lora
from opd_lightning.objective import Objective
from opd_lightning.processes import first_process
from opd_lightning.resume.files import WholeFiles

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


def trainer_from(config: DictConfig, history: EvaluationHistory, folder: Path) -> L.Trainer:
    """Build Lightning's trainer with its loggers, callbacks, strategy and evaluation interval.

    Raises:
        ConfigError: a setting that Lightning would refuse later, or take for something else.
    """
    settings, every = plain(config.trainer), config.evaluation.every_steps
    list(check_devices(settings))  # Lightning says it without the remedy
    _check_trainer(settings, every)
    planned, accumulate = settings["max_steps"], settings["accumulate_grad_batches"]
    check_one_count(accumulate, config.collector.micro_batch_tokens)
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


def _check_trainer(settings: dict[str, Any], every: object) -> None:
    steps, accumulate = settings["max_steps"], settings["accumulate_grad_batches"]
    numbers: list[tuple[str, Any, str, str]] = [
        ("trainer.max_steps", steps, "be at least 1 optimizer step", "use 320"),
        ("trainer.accumulate_grad_batches", accumulate, "be at least 1", "use 1 for no accumulation"),
        (
            "evaluation.every_steps",
            1 if every is None else every,
            "be at least 1 optimizer step",
            "use null to evaluate before and after training only",
        ),
    ]
    for field, value, condition, remedy in numbers:
        require(isinstance(value, int) and value >= 1, field, condition, value, remedy)
    known, accelerator = ("auto", "cpu", "gpu", "cuda", "mps", "tpu"), settings["accelerator"]
    condition = f"be one of {', '.join(known)}"
    require(accelerator in known, "trainer.accelerator", condition, accelerator, "use cpu or gpu")
    # Lightning's other precisions cast the batches too, which are frozen values.
    precision = str(settings["precision"])
    require(
        precision in ("32", "32-true", "16-mixed", "bf16-mixed"),
        "trainer.precision",
        "be 32-true, bf16-mixed or 16-mixed",
        precision,
        "use 32-true with student.dtype=bfloat16 to hold the weights themselves in bfloat16",
    )
