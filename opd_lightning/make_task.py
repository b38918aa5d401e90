"""``python -m opd_lightning.make_task out=DIR``: make the built-in tokenizer, teacher and student again."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from opd_lightning.collector import respond_and_grade
from opd_lightning.commands import build, command, plain, refuse_unknown_keys
from opd_lightning.diagnostics.responses import GroupedResponseMetrics
from opd_lightning.errors import require
from opd_lightning.prompts import Prompts
from opd_lightning.seeds import mix
from opd_lightning.task.pretrain import Phase, Progress, Size, new_model, pretrain, save
from opd_lightning.task.tokenizer import build_tokenizer
from opd_lightning.task.word_problems import WordProblems
from opd_lightning.types import Sampling

KEYS = {"task", "engine", "out", "roles", "seed", "problems", "tokenizer", "teacher", "student"}


def make(config: DictConfig) -> dict[str, dict[str, float]]:
    """Train and save each of ``config.roles``; return their accuracies.

    Raises:
        ConfigError: an unknown role or key.
    """
    refuse_unknown_keys(config, KEYS)
    known = {"teacher", "student"}
    require(set(config.roles) <= known, "roles", "name teacher or student", list(config.roles), "use both")
    task: WordProblems = build(config.task)
    wide = replace(task, min_steps=1, max_steps=8).problems("train")
    tokenizer = build_tokenizer(
        (wide[i] for i in range(config.tokenizer.problems)), size=config.tokenizer.vocab_size
    )
    return {role: _make(role, config, task, tokenizer) for role in config.roles}


def _make(
    role: str, config: DictConfig, task: WordProblems, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    settings, folder = plain(config[role]), Path(config.out) / role
    model = new_model(Size(**settings["size"]), tokenizer, mix(config.seed, role))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{role}: {millions:.2f} M parameters, vocabulary {model.config.vocab_size}", flush=True)
    phases = [Phase(**phase) for phase in settings["phases"]]
    planned, best = [phase.steps for phase in phases], 0.0

    def problems(phase: Phase) -> Any:
        # A seed of the role's own: student and teacher are cold-started on different problems.
        own = mix(config.seed, role, phases.index(phase))
        return replace(task, min_steps=phase.min_steps, max_steps=phase.max_steps, seed=own).problems("train")

    def report(progress: Progress) -> bool:
        nonlocal best
        done = sum(planned[: progress.phase]) + progress.step
        if done % 100 == 0:
            rate = progress.tokens / progress.seconds
            print(
                f"{role}: update {done}/{sum(planned)}, loss {progress.loss:.3f}, {progress.seconds:.0f} s, "
                f"{rate:.0f} response tokens/s",
                flush=True,
            )
        last = done == sum(planned)
        if not last and (done < settings["check_from"] or done % settings["check_every"]):
            return False
        accuracy = check(config, task, tokenizer, model, 0.0)["all"]["accuracy"]
        print(f"{role}: update {done}, greedy accuracy {accuracy:.1%}", flush=True)
        if accuracy >= best:
            best = accuracy
            save(model, tokenizer, folder)
        return accuracy >= settings["stop_at"]

    begun = time.perf_counter()
    pretrain(model, tokenizer, problems, phases, report)
    kept = type(model).from_pretrained(folder, dtype=torch.float32)
    greedy, sampled = (check(config, task, tokenizer, kept, t) for t in (0.0, 1.0))
    by_steps = {name: round(values["accuracy"], 3) for name, values in greedy.items()}
    print(
        f"{role}: {time.perf_counter() - begun:.0f} s; greedy {by_steps}, "
        f"sampled {sampled['all']['accuracy']:.3f}; in {folder}",
        flush=True,
    )
    return {"greedy": greedy["all"]["accuracy"], "sampled": sampled["all"]["accuracy"]}


@torch.no_grad()
def check(
    config: DictConfig,
    task: WordProblems,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
    temperature: float,
) -> dict[str, dict[str, float]]:
    """Return accuracy on validation problems, over all and by number of steps."""
    prompts = Prompts(
        problems=task.problems("validation"), tokenizer=tokenizer, max_tokens=512, long="refuse", seed=0
    )
    sampling = Sampling(max_new_tokens=128, temperature=temperature, stop_ids=(int(tokenizer.eos_token_id),))
    metrics, engine = GroupedResponseMetrics(), build(config.engine)
    asked = prompts.first(range(min(config.problems, len(prompts))))
    metrics.update(respond_and_grade(task, tokenizer, engine, model, asked, sampling))
    return {name: {k: float(v) for k, v in values.items()} for name, values in metrics.compute().items()}


@command("make_task")
def main(config: DictConfig) -> None:
    """Command line entry."""
    make(config)


if __name__ == "__main__":
    main()
