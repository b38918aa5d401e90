"""``python -m opd_lightning.preflight …``: what would go wrong in a run of the same words, before a model is loaded."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from opd_lightning.building import KEYS, makers, trainer_from
from opd_lightning.callbacks.history import EvaluationHistory
from opd_lightning.checks.finding import Finding, ok
from opd_lightning.checks.run import everything
from opd_lightning.commands import check_seed, command, plain, quiet, refuse_unknown_keys, sentence_of
from opd_lightning.errors import ConfigError
from opd_lightning.loading import ReadsProblems
from opd_lightning.models import load_tokenizer
from opd_lightning.prompts import Prompts
from opd_lightning.redaction import hide

_PATIENCE = {"patience_s": 1.0, "timeout_s": 10.0, "retries": 0}
"""How long a server is waited for here: a run that starts is more patient."""
_SOME = 256
"""Problems of a split that is made on the way that a teacher looks at."""
_MARKS = {"error": "[bold red]error[/]", "warning": "[yellow]warning[/]", "ok": "[green]ok[/]"}


def preflight(config: DictConfig, folder: Path) -> list[Finding]:
    """Return everything that is found, errors first."""
    given: dict[str, Any] = {}
    findings = list(_tried("settings", lambda: refuse_unknown_keys(config, KEYS)))
    findings += _tried("seed", lambda: check_seed(config.seed))
    findings += _tried("trainer", lambda: trainer_from(config, EvaluationHistory(), folder))
    for name, make in makers(config).items():
        findings += _tried(None, lambda name=name, make=make: given.update({name: _impatient(make())}))  # type: ignore[misc]
    for name, value in {"trainer": config.trainer, "values": config}.items():
        findings += _tried(None, lambda name=name, value=value: given.update({name: plain(value)}))  # type: ignore[misc]
    findings += everything(given | {"folder": folder})
    if not any(finding.level == "error" for finding in findings):
        findings += _prompts(given)
    known = {finding.line: finding for finding in findings}  # one that two checks found is one
    return sorted(known.values(), key=lambda finding: ("error", "warning", "ok").index(finding.level))


def _tried(about: str | None, make: Any) -> Iterator[Finding]:
    """Try one thing; yield the error, or that it is as it must be."""
    try:
        make()
    except (ConfigError, OmegaConfBaseException) as error:
        yield Finding.of(ConfigError(sentence_of(error)))
    else:
        if about is not None:
            yield ok(about, "as it must be")


def _impatient(part: Any) -> Any:
    """Return a part that waits for no server."""
    if not is_dataclass(part) or isinstance(part, type):
        return part
    less = {name: min(getattr(part, name), most) for name, most in _PATIENCE.items() if hasattr(part, name)}
    return replace(part, **less) if less else part


def _prompts(given: dict[str, Any]) -> Iterator[Finding]:
    """Read the task's files and their prompts, as assembling a run would."""
    collector, task = given["collector"], given["task"]
    tokenizer = load_tokenizer(given["student_path"], "student.path", given["trust_remote_code"])
    for split in dict.fromkeys(("train", given["split"])):
        count: list[int] = []

        def read(split: str = split, count: list[int] = count) -> None:
            problems = task.problems(split)
            limits = {"max_tokens": collector.max_prompt_tokens, "long": collector.long_prompts}
            pool = collector.prompt_pool if split == "train" else None
            if len(problems):
                prompts = Prompts(problems=problems, tokenizer=tokenizer, **limits, seed=0, pool=pool)
                count.append(len(prompts))
                if split == "train" and isinstance(given["teacher"], ReadsProblems):
                    given["teacher"].check_problems(prompts.known or problems[:_SOME])

        yield from _tried(None, read)
        if count:
            yield ok(f"task, {split}", f"{count[0]} prompts of at most {collector.max_prompt_tokens} tokens")


def table(findings: list[Finding]) -> Table:
    """Return the findings as a table, a row each."""
    shown = Table(title="preflight: nothing is loaded, nothing is trained")
    for name in ("", "setting", "finding", "what to do"):
        shown.add_column(name, overflow="fold")
    for finding in findings:
        words = (hide(text).replace("[", "\\[") for text in (finding.field, finding.sentence, finding.remedy))
        shown.add_row(_MARKS[finding.level], *words)
    return shown


@command("train")
def main(config: DictConfig) -> None:
    """Command line entry."""
    quiet()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    findings = preflight(config, folder)
    console = Console(file=sys.stdout)
    console.print(table(findings))
    if not any(word.startswith(("hydra.run", "hydra.sweep")) for word in hydra.overrides.hydra):
        for place in (folder, folder.parent):  # named by date and time, and made by Hydra
            with contextlib.suppress(OSError):
                place.rmdir()
    for finding in findings:
        if finding.level == "error":
            raise ConfigError(finding.line)


if __name__ == "__main__":
    main()
