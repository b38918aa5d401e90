"""``python -m opd_lightning.evaluate student.path=PATH``: grade a model's responses to held-out problems."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from opd_lightning.collector import respond_and_grade
from opd_lightning.commands import build, check_seed, command, git_commit, plain, quiet, refuse_unknown_keys
from opd_lightning.diagnostics.responses import GroupedResponseMetrics
from opd_lightning.errors import require
from opd_lightning.models import load_model, load_tokenizer, stop_ids
from opd_lightning.prompts import Prompts
from opd_lightning.types import Sampling

KEYS = {
    *("task", "student", "engine", "split", "problems", "temperature", "samples", "top_p", "top_k", "min_p"),
    *("max_new_tokens", "max_prompt_tokens", "long_prompts", "batch", "seed", "accelerator"),
    *("student.path", "student.dtype", "student.head_scratch_mb", "student.scoring_temperature"),
    *("student.layout", "student.compile", "student.lora", "student.trust_remote_code"),
    "student.gradient_checkpointing",
}
_SHOWN = ("split", "samples", "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "seed")


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Return accuracy, pass@k, length and truncation over all problems and by difficulty.

    Raises:
        ConfigError: settings, files or models that cannot work.
    """
    refuse_unknown_keys(config, KEYS)
    _check(config)
    task, engine = build(config.task), build(config.engine)
    problems = task.problems(config.split)
    require(
        len(problems) > 0,
        "split",
        "name problems of the task",
        config.split,
        "give task.val_path, or split=train",
    )
    named, trust = (config.student.path, "student.path"), config.student.trust_remote_code
    tokenizer = load_tokenizer(*named, trust)
    prompts = Prompts(
        problems=problems,
        tokenizer=tokenizer,
        max_tokens=config.max_prompt_tokens,
        long=config.long_prompts,
        seed=config.seed,
        group="",
    )
    model = load_model(*named, config.student.dtype, trust).to(config.accelerator)  # type: ignore[arg-type]
    sampling = replace(_sampling(config), stop_ids=stop_ids(model, tokenizer))
    metrics = GroupedResponseMetrics()
    rows = range(len(prompts) if config.problems is None else min(config.problems, len(prompts)))
    begun = time.perf_counter()
    for start in range(0, len(rows), config.batch):
        asked = (
            prompts.first(rows[start : start + config.batch]).repeat(config.samples).to(config.accelerator)
        )
        metrics.update(respond_and_grade(task, tokenizer, engine, model, asked, sampling))
    return {
        "student": config.student.path,
        "task": plain(config.task),
        "problems": len(rows),
        **{name: config[name] for name in _SHOWN},
        "seconds": round(time.perf_counter() - begun, 2),
        "metrics": {name: _numbers(values, config.samples) for name, values in metrics.compute().items()},
        "git_commit": git_commit(),
    }


def _sampling(config: DictConfig) -> Sampling:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")
    return Sampling(**{name: config[name] for name in names})


def _check(config: DictConfig) -> None:
    """Refuse a number out of its range, before a model is loaded."""
    check_seed(config.seed)
    lora = config.student.lora
    require(lora is None, "student.lora", "be null: a saved student holds its adapters", lora, "leave it out")
    for name in ("problems", "samples", "batch"):
        value = config[name]
        whole = (isinstance(value, int) and value >= 1) or (name == "problems" and value is None)
        remedy = "use null for all" if name == "problems" else "raise it"
        require(whole, name, "be a whole number of at least 1", value, remedy)
    _sampling(config).checked("")
    greedy_once = config.temperature > 0 or config.samples == 1
    require(
        greedy_once, "samples", "be 1 for greedy responses", config.samples, "set temperature=1.0 to sample"
    )
    known = {"cpu": True, "cuda": torch.cuda.is_available()}
    there = known.get(config.accelerator, False)
    require(there, "accelerator", "be cpu, or cuda where there is a GPU", config.accelerator, "use cpu")


def _numbers(values: dict[str, Any], samples: int) -> dict[str, float]:
    """Return plain numbers, the accuracy under its two other names too."""
    numbers = {name: float(value) for name, value in values.items()}
    numbers["responses"] = int(numbers["responses"])
    if "accuracy" in numbers:
        numbers["pass@1"] = numbers[f"avg@{samples}"] = numbers["accuracy"]
    return numbers


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table, a row for all problems and for each difficulty."""
    how = "greedy" if result["temperature"] == 0 else f"temperature {result['temperature']}"
    shown = Table(title=f"{result['student']}, {result['split']}, {result['problems']} problems, {how}")
    rows = result["metrics"]
    same = ("pass@1", f"avg@{result['samples']}")  # as the accuracy
    names = list(dict.fromkeys(name for values in rows.values() for name in values if name not in same))
    shown.add_column("problems")
    for name in names:
        label = {"accuracy": f"pass@1 (avg@{result['samples']})"}.get(name, name)
        shown.add_column(label, justify="right")
    for group, values in rows.items():
        cells = [_cell(name, values.get(name)) for name in names]
        shown.add_row(group, *cells)
    return shown


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "responses":
        return str(value)
    return f"{value:.1f}" if name == "length" else f"{value:.1%}"


@command("evaluate")
def main(config: DictConfig) -> float | None:
    """Command line entry; returns the accuracy for Hydra sweepers."""
    quiet()
    folder = Path(HydraConfig.get().runtime.output_dir)
    result = evaluate(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    # A pipe has no width; rich would take 80 columns and break numbers.
    Console(width=None if sys.stdout.isatty() else 160).print(table(result))
    print(f"written to {folder / 'evaluation.json'}", flush=True)
    return result["metrics"]["all"].get("accuracy")


if __name__ == "__main__":
    main()
