"""The README's fenced blocks by class, and its commands run in this process."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from opd_lightning import choose_horizon, evaluate, plan, preflight, train

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()

SHELL = ("run", "fails", "grid", "every", "setup", "gpu", "hub")
"""Classes of shell blocks; one without a class is not ours to run (tensorboard)."""
MAINS = {
    "opd_lightning.train": train.main,
    "opd_lightning.evaluate": evaluate.main,
    "opd_lightning.plan": plan.main,
    "opd_lightning.preflight": preflight.main,
    "opd_lightning.choose_horizon": choose_horizon.main,
}
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its class or the file that it is, and its text."""

    language: str
    kind: str | None
    file: str | None
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """One line of a shell block: variables set before it, and its words."""

    text: str
    variables: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module that ``python -m`` runs."""
        assert self.words[:2] == ("python", "-m"), self.text
        return self.words[2]

    @property
    def arguments(self) -> list[str]:
        """Its arguments, a training run cut to seconds."""
        given = list(self.words[3:])
        chosen = any(argument.startswith("debug=") for argument in given)
        fast = self.module == "opd_lightning.train" and not chosen
        return [*given, "debug=fast"] if fast else given


@dataclass(frozen=True)
class Finished:
    """A command that ended: exit code, what it printed, and the folder that it ran in."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def run(self) -> Path:
        """The one run folder that it left."""
        (summary,) = self.folder.glob("runs/**/summary.json")
        return summary.parent


def blocks(text: str = TEXT) -> list[Block]:
    """Return every fenced block, refusing an info string that means nothing here."""
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        language, *words = match["info"].split() or [""]
        file = next((w.removeprefix("file=") for w in words if w.startswith("file=")), None)
        kinds = [w for w in words if not w.startswith("file=")]
        known = {"bash": SHELL, "python": ("run",)}.get(language, ())
        assert all(kind in known for kind in kinds), (
            f"README line {line}: unknown class in ```{match['info']}"
        )
        assert len(kinds) <= 1, f"README line {line}: more than one class in ```{match['info']}"
        assert kinds or file or language in ("", "bash"), (
            f"README line {line}: ```{match['info']} has no class"
        )
        found.append(Block(language, kinds[0] if kinds else None, file, match["body"], line))
    return found


def links(text: str) -> list[str]:
    """Return the targets of a page's relative links, without what follows a #."""
    return re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", text)


def commands(kind: str) -> list[Command]:
    """Return the commands of every shell block of a class; entering the environment is not one."""
    lines = [
        line
        for block in blocks()
        if (block.language, block.kind) == ("bash", kind)
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    parsed = [command(line) for line in lines if line.strip()]
    return [c for c in parsed if c.words[:1] != (".",)]


def command(line: str) -> Command:
    """Parse one line of shell."""
    words = shlex.split(line, comments=True)
    variables = []
    while words and re.match(r"^\w+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables.append((name, value))
    return Command(line.strip(), tuple(variables), tuple(words))


def write_files(folder: Path) -> Path:
    """Write the README's own files into ``folder``."""
    for block in blocks():
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    return folder


def python_program() -> str:
    """Return the README's Python program."""
    (block,) = [b for b in blocks() if b.language == "python" and b.kind == "run"]
    return block.text


def substituted(program: str, changes: dict[str, str]) -> str:
    """Return a program with each pattern replaced wherever it stands, and it must stand somewhere."""
    for pattern, new in changes.items():
        program, count = re.subn(pattern, new, program)
        assert count, f"the README's program has no {pattern}"
    return program


def run_program(program: str, **names: object) -> dict[str, object]:
    """Run a program as a script and return its names."""
    space = {"__name__": "__main__", **names}
    with _as_before():
        exec(compile(program, "README.md", "exec"), space)
    return space


def run_here(module: str, arguments: list[str], folder: Path, path: str | None = None) -> Finished:
    """Run ``python -m module arguments`` in ``folder`` inside this process, and leave the process as it was."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, _as_before():
        patch.setattr(sys, "argv", [module, *arguments])
        patch.chdir(folder)
        for entry in (path or "").split(os.pathsep) if path else []:
            patch.syspath_prepend(str((folder / entry).resolve()))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                MAINS[module]()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
    return Finished(code, out.getvalue(), err.getvalue(), folder)


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Undo what a command leaves behind in a process: log handlers, Hydra's state, variables, modules."""
    root, modules = logging.getLogger(), set(sys.modules)
    handlers, level, variables = root.handlers[:], root.level, dict(os.environ)
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        root.handlers[:], root.level = handlers, level
        os.environ.clear()
        os.environ.update(variables)
        for name in set(sys.modules) - modules:
            if name.split(".")[0] == "my_parts":
                del sys.modules[name]
