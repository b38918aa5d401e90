"""``python -m opd_lightning.train``: distil a student from a teacher on the student's own rollouts."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from opd_lightning.assemble import CollectorSettings, Run, assemble
from opd_lightning.callbacks.history import EvaluationHistory
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
from opd_lightning.diagnostics.responses import ResponseMetrics
from opd_lightning.errors import ConfigError, require
from opd_lightning.export import save_student
from opd_lightning.lora import Lora
from opd_lightning.objective import Objective
from opd_lightning.protocols import Follows

log = logging.getLogger(__name__)

KEYS = {
    *("task", "student", "teacher", "engine", "rollout", "support", "estimator", "divergence", "reward"),
    *("regularizer", "mask", "reduction", "collector", "evaluation", "optimizer", "scheduler", "trainer"),
    *("strategy", "logger", "callbacks", "reference", "seed"),
    *("student.path", "student.dtype", "student.head_chunk", "student.scoring_temperature"),
    "student.lora",
    *("evaluation.split", "evaluation.every_steps", "evaluation.settings", "evaluation.teacher"),
    *(f"collector.{field.name}" for field in fields(CollectorSettings)),
}


def objective_from(config: DictConfig) -> Objective:
    """Build the objective's parts and check them against each other."""
    return Objective(
        estimator=build(config.estimator),
        support=build(config.support),
        reduction=build(config.reduction),
        regularizers={name: build(part) for name, part in (config.get("regularizer") or {}).items()},
        masks={name: build(part) for name, part in (config.get("mask") or {}).items()},
    )


def run_from(config: DictConfig) -> Run:
    """Build a run, cheap parts before models."""
    objective = objective_from(config)
    return assemble(
        objective=objective,
        rollout=build(config.rollout),
        engine=build(config.engine),
        collector=CollectorSettings(**plain(config.collector)),
        evaluation=build(config.evaluation.settings),
        optimizer=optimizer_from(config),
        scheduler=build(config.scheduler),
        reference=build(config.reference),
        task=build(config.task),
        teacher=build(config.teacher),
        student_path=config.student.path,
        student_dtype=config.student.dtype,
        head_chunk=config.student.head_chunk,
        temperature=config.student.scoring_temperature,
        lora=lora_from(config),
        split=config.evaluation.split,
        seed=config.seed,
    )


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
        default_root_dir=str(folder),
        val_check_interval=every * accumulate if evaluates else planned * accumulate,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, L.pytorch.callbacks.ModelCheckpoint) for c in callbacks),
    )


def plan(config: DictConfig, run: Run, folder: Path) -> str:
    """Return what the run will do, in a few lines."""
    student, teacher = run.module.student, run.teacher.scorer
    millions = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (student, teacher)]
    collector, rollout, trainer = config.collector, config.rollout, config.trainer
    responses = collector.prompts_per_collection * run.data.collector.rollout.samples
    changes = "follows the student" if isinstance(run.teacher, Follows) else "frozen"
    parts = [config.estimator, config.support, config.reduction]
    names = " + ".join(str(part._target_).rsplit(".", 1)[-1] for part in parts)
    return "\n".join(
        [
            f"student   {config.student.path} ({millions[0]:.2f} M parameters)",
            f"teacher   {config.teacher.path} ({millions[1]:.2f} M parameters, {changes})",
            f"objective {names}",
            f"plan      {trainer.max_steps} optimizer steps, {collector.steps_per_collection} on each collection of "
            f"{responses} responses of at most {_number(rollout.max_new_tokens)} tokens",
            f"folder    {folder}  (tensorboard --logdir {folder})",
        ]
    )


def _number(value: Any) -> str:
    """Return a number, or what a schedule goes through, for people."""
    if not isinstance(value, DictConfig):
        return str(value)
    steps = ", ".join(f"{name!s} {inner}" for name, inner in value.items() if name != "_target_")
    return f"{str(value._target_).rsplit('.', 1)[-1].lower()}({steps})"


def train(config: DictConfig, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run everything and return the summary.

    Raises:
        ConfigError: a configuration that cannot work.
    """
    begun = time.perf_counter()
    refuse_unknown_keys(config, KEYS)
    check_seed(config.seed)
    L.seed_everything(config.seed, verbose=False)
    history = EvaluationHistory()
    trainer = trainer_from(config, history, folder)
    run = run_from(config)
    run.data.collector.check_world(trainer.world_size)  # before a child process starts
    if trainer.is_global_zero:
        say_unused_support(run.module.objective)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)
        print(plan(config, run, folder), flush=True)
    if run.data.validation is not None:
        trainer.validate(run.module, datamodule=run.data, verbose=False)
    log_settings(trainer, config, overrides, history.at.get(0, {}))
    trainer.fit(run.module, datamodule=run.data)
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
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(closing(summary, folder), flush=True)
    return summary


def log_settings(
    trainer: L.Trainer, config: DictConfig, overrides: list[str], before: dict[str, float]
) -> None:
    """Give the loggers the configuration; TensorBoard shows what tells runs apart beside their accuracy."""
    accuracies = {name: value for name, value in before.items() if "accuracy" in name}
    for logger in trainer.loggers:
        if isinstance(logger, L.pytorch.loggers.TensorBoardLogger):
            # The metrics are written at step 0; later values of the same names then fill the table.
            logger.log_hyperparams(method_settings(config, overrides), accuracies or {"train/tokens": 0.0})
        else:
            logger.log_hyperparams(plain(config) | {"overrides": " ".join(overrides)})


def method_settings(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Return the settings of the method as flat names, each part by its class, overrides first in the table."""
    settings: dict[str, Any] = {"Overrides": " ".join(overrides) or "none", "seed": config.seed}
    values = plain(config)
    for group in (
        "estimator",
        "support",
        "rollout",
        "reduction",
        "mask",
        "regularizer",
        "optimizer",
        "scheduler",
    ):
        for name, value in _flat(group, values.get(group) or {}).items():
            if name.endswith("_target_"):
                settings[name.removesuffix("/_target_")] = str(value).rsplit(".", 1)[-1]
            elif not name.endswith("_partial_"):
                settings[name] = value if isinstance(value, int | float | str | bool) else str(value)
    chosen = ("prompts_per_collection", "steps_per_collection")
    settings |= {f"collector/{name}": values["collector"][name] for name in chosen}
    settings |= {f"{model}/path": values[model]["path"] for model in ("student", "teacher")}
    return settings | {"trainer/max_steps": values["trainer"]["max_steps"]}


def _flat(prefix: str, value: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(f"{prefix}/{name}", inner) if isinstance(inner, dict) else {f"{prefix}/{name}": inner}
    return flat


def teacher_accuracy(run: Run) -> float | None:
    """Return the share of held-out problems that the teacher answers rightly, greedily, on this process."""
    data = run.data
    if data.validation is None:
        return None
    if run.teacher.view is not None:
        log.info("teacher_accuracy is left out: without its context the teacher is a student")
        return None
    metric = ResponseMetrics(sync_on_compute=False)
    sampling, samples = data.evaluation.modes()[0]
    count = min(data.evaluation.problems or len(data.validation), len(data.validation))
    scorer = run.teacher.scorer
    for graded in data.collector.evaluate(
        scorer, data.validation, range(count), sampling, samples, data.evaluation.batch
    ):
        metric.update(graded)
    accuracy = metric.compute().get("accuracy")
    return None if accuracy is None else float(accuracy)


def summarise(
    run: Run, trainer: L.Trainer, history: EvaluationHistory, teacher: float | None
) -> dict[str, Any]:
    """Return the numbers of a finished run."""
    before, after = history.at.get(0, {}), history.at.get(trainer.global_step, {})
    clock = run.data.collector.clock
    scale = 1024 if sys.platform != "darwin" else 1024**2
    return {
        "accuracy_before": before.get("eval/accuracy"),
        "accuracy_after": after.get("eval/accuracy"),
        "accuracy_before_sampled": before.get("eval/accuracy_sampled"),
        "accuracy_after_sampled": after.get("eval/accuracy_sampled"),
        "teacher_accuracy": teacher,
        "evaluations": {str(step): metrics for step, metrics in sorted(history.at.items())},
        "optimizer_steps": trainer.global_step,
        "response_tokens": clock.tokens["generate"],
        "tokens_per_second": {k: round(v, 1) for k, v in clock.tokens_per_second().items()},
        "seconds_by_phase": {k: round(v, 2) for k, v in clock.seconds.items()},
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1),
    }


def closing(summary: dict[str, Any], folder: Path) -> str:
    """Return the last lines that a run prints."""
    lines = []
    if summary["accuracy_before"] is not None and summary["accuracy_after"] is not None:
        lines.append(
            f"greedy accuracy {summary['accuracy_before']:.1%} -> {summary['accuracy_after']:.1%}"
            + (
                f" (teacher {summary['teacher_accuracy']:.1%})"
                if summary["teacher_accuracy"] is not None
                else ""
            )
        )
    rates = ", ".join(f"{k} {v:.0f}" for k, v in summary["tokens_per_second"].items())
    lines.append(
        f"{summary['seconds']:.0f} s, {summary['response_tokens']} response tokens; tokens/s: {rates}"
    )
    lines.append(f"student, summary.json, metrics.csv and events are in {folder}")
    return "\n".join(lines)


@command("train")
def main(config: DictConfig) -> float | None:
    """Command line entry; returns the accuracy after training for Hydra sweepers."""
    quiet()
    hydra_config = HydraConfig.get()
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    if hydra_config.mode == RunMode.MULTIRUN and (devices not in (1, "1") or nodes != 1):
        raise ConfigError(
            f"`trainer.devices` must be 1 in a multirun, got {devices}: a process-launching strategy would rerun the "
            "whole sweep in each child; use trainer.devices=1, or run each job by its own command"
        )
    overrides = list(hydra_config.overrides.task)
    summary = train(config, Path(hydra_config.runtime.output_dir), overrides)
    return summary["accuracy_after"]


if __name__ == "__main__":
    main()
