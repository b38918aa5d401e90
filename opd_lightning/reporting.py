"""What a training run says of itself: its plan, the loggers' table, its summary and its last lines."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch.optim import Optimizer

from opd_lightning.assemble import Run
from opd_lightning.callbacks.history import EvaluationHistory
from opd_lightning.commands import build, plain
from opd_lightning.diagnostics.responses import ResponseMetrics
from opd_lightning.diagnostics.utilisation import measured_peak
from opd_lightning.errors import ConfigError
from opd_lightning.layers import is_sharded
from opd_lightning.loading import FrozenScorer
from opd_lightning.lora import Lora
from opd_lightning.objective import Objective
from opd_lightning.planning.cost import cost
from opd_lightning.planning.memory import memory
from opd_lightning.planning.report import short
from opd_lightning.planning.run import PlannedRun
from opd_lightning.planning.settings import Assumptions, planned_run
from opd_lightning.protocols import Follows, RolloutSampler, Spread
from opd_lightning.redaction import hide, redacted

log = logging.getLogger(__name__)


def assumptions(config: DictConfig) -> Assumptions:
    """Return what an estimate of this configuration assumes."""
    assumed = build(config.planning)
    assert isinstance(assumed, Assumptions)
    return assumed


_READ = ("student", "teacher", "reference", "engine", "strategy", "trainer", "collector", "evaluation")
"""Groups that an estimate reads."""


def planned(
    config: DictConfig,
    objective: Objective,
    rollout: RolloutSampler,
    optimizer: Callable[..., Optimizer],
    lora: Lora | None,
    prompt_tokens: int | None = None,
    processes: int | None = None,
) -> PlannedRun:
    """Return the numbers that an estimate follows from; see :mod:`opd_lightning.planning`.

    ``prompt_tokens`` and ``processes`` stand in for what the configuration says, where they are known.
    """
    assumed = assumptions(config)
    if assumed.prompt_tokens is None and prompt_tokens is not None:
        assumed = replace(assumed, prompt_tokens=prompt_tokens)
    values = {name: plain(config[name]) if config[name] is not None else {} for name in _READ}
    return planned_run(values, objective, rollout, optimizer, assumed, lora=lora, processes=processes)


def peak_of(config: DictConfig) -> float:
    """Return the TFLOP/s of a process's device, as assumed; a CPU's is measured where nothing is said."""
    assumed = assumptions(config)
    if config.trainer.accelerator != "cpu":
        return float(config.reporting.peak_tflops or assumed.gpu_tflops)
    known = config.reporting.peak_tflops or assumed.cpu_tflops
    return float(known or measured_peak(torch.device("cpu"), torch.float32))


def _cost(config: DictConfig, run: Run, processes: int) -> str:
    """Return memory and tokens of a run that is about to begin, in one line: an estimate."""
    lora = None if config.student.lora is None else build(config.student.lora)
    parts = (run.module.objective, run.data.collector.rollout, run.module.make_optimizer, lora)
    try:
        longest = int(run.data.collector.prompts.stream(range(_PROMPTS)).mask.sum(-1).max())
        found = planned(config, *parts, prompt_tokens=longest, processes=processes)
        return short(memory(found), cost(found, 1.0, assumptions(config).utilisation))
    except (ConfigError, AttributeError, KeyError, TypeError) as error:
        log.debug("no estimate: %s", error)  # of a part of somebody's own, whose shape is not known
        return "not known for these parts"


_PROMPTS = 32
"""Prompts whose lengths stand for all, at a run's start."""


def plan(config: DictConfig, run: Run, folder: Path, micro_batches: int, processes: int = 1) -> str:
    """Return what the run will do, in a few lines."""
    millions = sum(p.numel() for p in run.module.student.parameters()) / 1e6
    collector, rollout, trainer = config.collector, config.rollout, config.trainer
    responses = collector.prompts_per_collection * run.data.collector.rollout.samples
    parts = [config.estimator, config.support, config.reduction]
    names = " + ".join(str(part._target_).rsplit(".", 1)[-1] for part in parts)
    cut = f" of {micro_batches} micro-batches" if micro_batches > 1 else ""
    return "\n".join(
        [
            f"student   {config.student.path} ({millions:.2f} M parameters)",
            f"teacher   {_where(config)} ({_teacher(run, processes)})",
            f"objective {names}",
            f"plan      {trainer.max_steps} optimizer steps{cut}, {collector.steps_per_collection} on each "
            f"collection of {responses} responses of at most {_number(rollout.max_new_tokens)} tokens",
            f"cost      {_cost(config, run, processes)}",
            f"folder    {folder}  (tensorboard --logdir {folder})",
        ]
    )


def _where(config: DictConfig) -> str:
    """Return the teacher's path, the address of one elsewhere, or the column that names a row's."""
    teacher = config.teacher
    return hide(str(teacher.get("path") or teacher.get("address") or f"by {teacher.get('column')}"))


def _teacher(run: Run, processes: int) -> str:
    """Return what there is to say of the teacher's weights."""
    if not isinstance(run.teacher, FrozenScorer):
        return str(getattr(run.teacher, "kind", "elsewhere"))
    millions = sum(p.numel() for p in run.teacher.scorer.parameters()) / 1e6
    changes = "follows the student" if isinstance(run.teacher, Follows) else "frozen"
    placed = f", {run.teacher.placed(processes)}" if isinstance(run.teacher, Spread) else ""
    return f"{millions:.2f} M parameters, {changes}{placed}"


def _number(value: Any) -> str:
    """Return a number, or what a schedule goes through, for people."""
    if not isinstance(value, DictConfig):
        return str(value)
    steps = ", ".join(f"{name!s} {inner}" for name, inner in value.items() if name != "_target_")
    return f"{str(value._target_).rsplit('.', 1)[-1].lower()}({steps})"


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
            logger.log_hyperparams(redacted(plain(config)) | {"overrides": " ".join(overrides)})


def method_settings(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Return the settings of the method as flat names, each part by its class, overrides first in the table."""
    settings: dict[str, Any] = {"Overrides": " ".join(overrides) or "none", "seed": config.seed}
    values = redacted(plain(config))
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
    settings |= {"student/path": values["student"]["path"], "teacher/path": _where(config)}
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
    if not isinstance(run.teacher, FrozenScorer):
        log.info("teacher_accuracy is left out: the teacher is served, cached or several")
        return None
    if run.teacher.view is not None:
        log.info("teacher_accuracy is left out: without its context the teacher is a student")
        return None
    if is_sharded(run.teacher.scorer.model):
        log.info("teacher_accuracy is left out: the teacher is sharded, and one process asks for it")
        return None
    metric = ResponseMetrics(sync_on_compute=False)
    sampling, samples = data.evaluation.modes()[0]
    count = min(data.evaluation.problems or len(data.validation), len(data.validation))
    scorer = run.teacher.scorer
    with run.teacher.awake():
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
        **_utilisation(run),
        "seconds_by_phase": {k: round(v, 2) for k, v in clock.seconds.items()},
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1),
    }


def _utilisation(run: Run) -> dict[str, Any]:
    """Return model TFLOP/s by phase, and their share of the peak; see :mod:`opd_lightning.diagnostics.utilisation`."""
    rates, peak = run.data.collector.clock.tflops(), run.data.peak_tflops
    shares = {name: rate / peak for name, rate in rates.items()} if peak else {}
    return {
        "peak_tflops": peak and float(f"{peak:.4g}"),
        "model_tflops": {name: float(f"{rate:.4g}") for name, rate in rates.items()},
        "mfu": {name: round(share, 4) for name, share in shares.items()},
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
    if summary["mfu"]:
        shares = ", ".join(f"{k} {v:.1%}" for k, v in summary["mfu"].items() if k != "all")
        lines.append(
            f"model FLOPs utilisation {summary['mfu']['all']:.1%} of {summary['peak_tflops']} TFLOP/s; {shares}"
        )
    lines.append(f"student, summary.json, metrics.csv and events are in {folder}")
    return "\n".join(lines)
