"""Where the project's own files are: the configuration folder and the shipped checkpoints."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

CONF_DIR = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())
"""The Hydra configuration: beside the package in a checkout, inside it in a wheel."""

CHECKPOINTS = _PACKAGE / "checkpoints"
"""Checkpoints shipped with the package, one folder a task, each with a teacher and a student."""

_BUILTIN = "builtin:"


def model_path(path: str) -> str:
    """Return what transformers should load for ``path``.

    ``builtin:word_problems/student`` names a shipped checkpoint; anything else, a local folder or a
    name on a model hub, is returned as it is, but for ``~``.
    """
    if path.startswith(_BUILTIN):
        return str(CHECKPOINTS / path.removeprefix(_BUILTIN))
    return str(Path(path).expanduser()) if path.startswith("~") else path
