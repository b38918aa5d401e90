"""What a run reads from elsewhere: weights on disk, a cache's folder, an engine behind an address."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_lightning.checks.finding import Finding, ok, warning
from opd_lightning.checks.lengths import rows_of
from opd_lightning.checks.parts import Sizes
from opd_lightning.errors import ConfigError, require
from opd_lightning.loading import SharesVocabulary, TeacherSource
from opd_lightning.objective import Objective
from opd_lightning.paths import model_path
from opd_lightning.protocols import Engine, RolloutSampler
from opd_lightning.weights import check_weights


def weights(
    student_path: str, teacher: TeacherSource, reference: Any, objective: Objective
) -> Iterator[Finding]:
    """Refuse weights on this disk that are no whole safetensors; those of a server are its own."""
    named = {"student.path": student_path}
    if not isinstance(teacher, SharesVocabulary) and not hasattr(teacher, "limits"):
        named["teacher.path"] = teacher.path
    path = getattr(reference, "path", None)
    if objective.needs.reference and path is not None:
        named["reference.path"] = path
    for field, name in named.items():
        check_weights(Path(model_path(name)), name, field)
    yield ok("student.path", f"safetensors of {' and '.join(named)} are whole where they are on this disk")


def engine(engine: Engine, rollout: RolloutSampler, collector: Sizes) -> Iterator[Finding]:
    """Refuse an engine's server that does not answer, or whose rows are too short.

    A server is started on what a first run leaves in ``engine.folder``: before that, its silence is a warning.
    """
    server = getattr(engine, "server", None)
    if server is None:
        return
    folder = getattr(engine, "folder", None)
    try:
        longest = server.longest()
    except ConfigError as error:
        if folder is None or (Path(folder) / "config.json").is_file():
            raise
        found = Finding.of(error)
        condition = "answer, unless this run is the one that leaves its folder for it"
        yield warning("engine.url", condition, found.sentence, found.remedy)
        return
    rows = rows_of(rollout, collector.max_prompt_tokens)
    remedy = (
        "raise the server's --max-model-len, or lower rollout.max_new_tokens or collector.max_prompt_tokens"
    )
    require(
        rows is None or rows <= longest,
        "engine.url",
        f"name a server for rows of at least {rows} tokens",
        longest,
        remedy,
    )
    yield ok("engine.url", f"answers, and takes rows of {longest} tokens")


def cache(teacher: TeacherSource) -> None:
    """Refuse a folder for the teacher's scores that cannot be written."""
    folder = getattr(teacher, "cache", None)
    if folder is None:
        return
    path = Path(folder).expanduser()
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    writable = place.is_dir() and os.access(place, os.W_OK)
    require(writable, "teacher.cache", "be a folder that can be written", folder, "use another, or null")
