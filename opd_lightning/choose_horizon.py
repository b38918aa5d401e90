"""``python -m opd_lightning.choose_horizon``: the N of early-stopping rollouts, for two models and a task."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from opd_lightning.commands import build, check_seed, command, git_commit, plain, quiet, refuse_unknown_keys
from opd_lightning.diagnostics.horizon import DivergenceByPosition
from opd_lightning.errors import require
from opd_lightning.functional.divergence import reverse_kl
from opd_lightning.layers import check_compiled, eager
from opd_lightning.layout import check_layout
from opd_lightning.loading import FrozenScorer, Loading, check_scratch, holding, load_scorer, paired
from opd_lightning.models import check_dtype, stop_ids
from opd_lightning.prompts import Prompts
from opd_lightning.protocols import Engine
from opd_lightning.schedule import within
from opd_lightning.scorer import Scorer
from opd_lightning.types import FullTerm, PromptBatch, Sampling, TokenBatch, Want

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")
KEYS = {
    *("task", "student", "teacher", "engine", "share", "rollouts", "split", *SAMPLING),
    *("max_prompt_tokens", "long_prompts", "batch", "seed", "accelerator"),
    *("student.path", "student.dtype", "student.head_scratch_mb", "student.scoring_temperature"),
    *("student.layout", "student.compile", "student.lora", "student.trust_remote_code"),
    "student.gradient_checkpointing",
}
_TERM = FullTerm("teacher", reverse_kl)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A student and its teacher before training, with what generates and reads prompts."""

    student: Scorer
    teacher: FrozenScorer
    engine: Engine
    prompts: Prompts
    sampling: Sampling

    @torch.no_grad()
    def measure(self, positions: Sequence[int], batch: int) -> DivergenceByPosition:
        """Return the exact KL(S||T) along one response to each of these prompts of the stream."""
        found = DivergenceByPosition()
        with holding(self.teacher):
            for start in range(0, len(positions), batch):
                prompts = self.prompts.stream(positions[start : start + batch]).to(self.student.device)
                with eager(self.student.model):
                    drawn = self.engine.generate(self.student.model, prompts, self.sampling)
                found = found.add(self._divergence(prompts, drawn.ids, drawn.mask), drawn.mask)
        return found

    def _divergence(self, prompts: PromptBatch, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        def hidden(scorer: Scorer | FrozenScorer, seen: PromptBatch) -> torch.Tensor:
            tokens = TokenBatch(prompt_ids=seen.ids, prompt_mask=seen.mask, ids=ids, mask=mask)
            states = scorer(tokens, Want(hidden=True)).hidden
            assert states is not None
            return states[mask]

        view = self.teacher.view
        own = hidden(self.student, prompts)
        values = self.student.compare(own, hidden(self.teacher, view(prompts) if view else prompts), _TERM)
        return values.new_zeros(mask.shape).index_put(torch.where(mask), values)


def load(config: DictConfig) -> Pair:
    """Load both models and the prompts, cheap checks first.

    Raises:
        ConfigError: settings, files or models that cannot work.
    """
    task, engine, source = build(config.task), build(config.engine), build(config.teacher)
    problems = task.problems(config.split)
    require(len(problems) > 0, "split", "name problems of the task", config.split, "use split=train")
    path, dtype = config.student.path, config.student.dtype
    check_dtype(dtype, "student.dtype")
    check_dtype(source.dtype, "teacher.dtype")
    here = getattr(source, "gives_hidden", True)
    remedy = "use teacher=builtin teacher.path=…, without teacher.cache and teacher.shard"
    require(
        here, "teacher", "be in this process, to compare whole vocabularies", type(source).__name__, remedy
    )
    trust = config.student.trust_remote_code
    tokenizer, vocab = paired(path, source, trust)
    prompts = Prompts(
        problems=problems,
        tokenizer=tokenizer,
        max_tokens=config.max_prompt_tokens,
        long=config.long_prompts,
        seed=config.seed,
        group="",
    )
    scratch, temperature = config.student.head_scratch_mb, config.student.scoring_temperature
    layout, compiled = config.student.layout, config.student.compile
    read = (vocab, scratch, temperature, layout, compiled)
    student = load_scorer(path, "student.path", dtype, *read, trust=trust)
    student = student.eval().requires_grad_(False).to(config.accelerator)
    loading = Loading(
        student=student,
        student_path=path,
        student_dtype=dtype,
        tokenizer=tokenizer,
        vocab=vocab,
        scratch_mb=scratch,
        temperature=temperature,
        layout=layout,
        compiled=compiled,
        max_prompt_tokens=config.max_prompt_tokens,
        problems=prompts.known,
        trusted=trust,
    )
    teacher = source.load(loading)
    assert isinstance(teacher, FrozenScorer)
    teacher.keep_head()
    teacher = teacher.to(config.accelerator)
    student.set_target("teacher", teacher.scorer)
    sampling = replace(_sampling(config), stop_ids=stop_ids(student.model, tokenizer), vocab=vocab)
    return Pair(student=student, teacher=teacher, engine=engine, prompts=prompts, sampling=sampling)


def _sampling(config: DictConfig) -> Sampling:
    return Sampling(**{name: config[name] for name in SAMPLING})


def check(config: DictConfig) -> None:
    """Refuse a setting out of its range, before a model is loaded.

    Raises:
        ConfigError: there is one.
    """
    refuse_unknown_keys(config, KEYS)
    check_seed(config.seed)
    share = config.share
    number = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1
    require(number, "share", "be in (0, 1]", share, "use 0.45, the authors' value")
    for name in ("rollouts", "batch"):
        value = config[name]
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(whole, name, "be a whole number of at least 1", value, "raise it")
    _sampling(config).checked("")
    require(
        config.temperature > 0, "temperature", "be above 0", config.temperature, "use 0.7, as rollout=esr"
    )
    student = config.student
    lora, scratch, tau = student.lora, student.head_scratch_mb, student.scoring_temperature
    require(lora is None, "student.lora", "be null: untrained adapters change nothing", lora, "leave it out")
    check_scratch(scratch)
    scale, remedy = within(tau, 1e-3, 1e3), "use 1 for the models' own distributions"
    require(scale, "student.scoring_temperature", "be a number above 0", tau, remedy)
    check_layout(student.layout)
    check_compiled(student.compile)
    there = {"cpu": True, "cuda": torch.cuda.is_available()}.get(config.accelerator, False)
    remedy = "use cpu"
    require(there, "accelerator", "be cpu, or cuda where there is a GPU", config.accelerator, remedy)


def next_command(horizon: int, overrides: Sequence[str]) -> str:
    """Return the command that trains with this N, with the models, task and sampler that it was chosen for.

    >>> next_command(7, ["teacher.path=a b", "batch=3", "top_p=1", "max_new_tokens=9"])
    "python -m opd_lightning.train rollout=esr rollout.max_new_tokens=7 'teacher.path=a b' rollout.top_p=1"
    """
    words = ["rollout=esr", f"rollout.max_new_tokens={horizon}"]
    renamed = {name: f"rollout.{name}" for name in SAMPLING if name != "max_new_tokens"}
    renamed |= {name: f"collector.{name}" for name in ("max_prompt_tokens", "long_prompts")}
    for override in overrides:
        key, _, value = override.partition("=")
        if re.split(r"[./]", key.lstrip("+~"))[0] in ("task", "student", "teacher", "engine"):
            words.append(override)
        elif key in renamed:
            words.append(f"{renamed[key]}={value}")
    return " ".join(["python", "-m", "opd_lightning.train", *map(shlex.quote, words)])


def curve_table(found: DivergenceByPosition, horizon: int) -> Table:
    """Return the curve at a few positions, the horizon among them."""
    shown = Table(title=f"reverse KL along {found.responses} responses of the student, nats")
    for name in ("N", "responses that long", "mean at N", "first N tokens", "share"):
        shown.add_column(name, justify="right")
    columns = found.tokens, found.mean, found.cumulative, found.share
    for n in found.positions(also=horizon):
        tokens, mean, cumulative, share = (float(values[n - 1]) for values in columns)
        cells = [str(n), f"{tokens:.0f}", f"{mean:.4f}", f"{cumulative:.3f}", f"{share:.1%}"]
        shown.add_row(*cells, style="bold" if n == horizon else None)
    return shown


@command("choose_horizon")
def main(config: DictConfig) -> int:
    """Command line entry; returns N for Hydra sweepers."""
    quiet()
    check(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    pair, begun = load(config), time.perf_counter()
    found = pair.measure(range(config.rollouts), config.batch)
    horizon = found.horizon(config.share)
    following = next_command(horizon, list(HydraConfig.get().overrides.task))
    result: dict[str, Any] = {
        "horizon": horizon,
        "share": config.share,
        "reached": float(found.share[horizon - 1]),
        "mean_divergence": float(found.cumulative[-1]),
        "mean_length": int(found.tokens.sum()) / found.responses,
        "next": following,
        "settings": plain(config),
        "seconds": round(time.perf_counter() - begun, 2),
        "git_commit": git_commit(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "horizon.json").write_text(json.dumps(result, indent=2) + "\n")
    found.write(folder / "horizon.csv")
    # A pipe has no width; rich would take 80 columns and break numbers.
    Console(width=None if sys.stdout.isatty() else 160).print(curve_table(found, horizon))
    print(f"N = {horizon}: its first tokens hold {result['reached']:.1%} (asked for {config.share:.0%})")
    print(f"next: {following}")
    print(f"{result['seconds']} s; horizon.json and horizon.csv are in {folder}", flush=True)
    return horizon


if __name__ == "__main__":
    main()
