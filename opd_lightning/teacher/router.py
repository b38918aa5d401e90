"""One teacher for each row: a column of the data names it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.errors import ConfigError, require
from opd_lightning.loading import Loading, TeacherSource, same_temperature, shared_width
from opd_lightning.models import check_dtype
from opd_lightning.protocols import Follows
from opd_lightning.teacher.local import LocalTeacher
from opd_lightning.teacher.routed import DEFAULT, FollowingScorer, RoutedScorer, Routing, naming
from opd_lightning.types import Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Router:
    """Several teachers by name, each of the rows that name it (multi-teacher distillation).

    A teacher is a folder or hub name, or any other option of the group::

        teacher=router teacher.column=source +teacher.teachers.math=/models/math +teacher.teachers.code=/models/code
        teacher=router teacher.column=source +teacher@teacher.teachers.code=served \\
            teacher.teachers.code.address=http://127.0.0.1:8765 teacher.default=/models/general
        '+teacher.routes={gsm8k: math, olympiad: math, apps: code}'

    All teachers share the student's vocabulary, up to the narrowest width of all. The whole vocabulary cannot be
    compared (``support=full``), and no teacher writes text.

    Args:
        column: of the data; a task's ``difficulty``, ``answer`` and ``response`` are columns too.
        teachers: by name. A null one is left out.
        routes: from a value of the column to a teacher's name; a value that it does not hold is a name itself.
        default: the teacher of rows whose column is missing or names no other; None refuses such rows.
        dtype: torch dtype of the weights of teachers that are given by a path alone.

    Raises:
        ConfigError: no teacher at all, one that is none, or a route to an unknown one.
    """

    column: str
    teachers: Mapping[Any, TeacherSource | str | None]  # a name such as 1 is a number in yaml
    routes: Mapping[Any, str]
    default: TeacherSource | str | None
    dtype: str

    gives_hidden = False
    """Hidden states are of one model's head."""

    def __post_init__(self) -> None:
        text = isinstance(self.column, str) and bool(self.column)
        require(text, "teacher.column", "be the name of a column", self.column, "use the data's own")
        check_dtype(self.dtype, "teacher.dtype")
        named = isinstance(self.teachers, Mapping) and DEFAULT not in self.teachers
        remedy = "write +teacher.teachers.NAME=PATH, and teacher.default=PATH for rows that name no other"
        require(
            named,
            "teacher.teachers",
            f"be teachers by name, none of which is {DEFAULT}",
            self.teachers,
            remedy,
        )
        require(bool(self.sources), "teacher.teachers", "hold a teacher", self.teachers, remedy)
        for name, source in self.sources.items():
            alone = isinstance(source, TeacherSource) and not isinstance(source, Router)
            require(alone, self.fields[name], "be a path, or an option of teacher but router", source, remedy)
            check_dtype(source.dtype, f"{self.fields[name]}.dtype")
            # Processes have other rows of a teacher each, or none, and could not meet in its forwards.
            whole, remedy = not getattr(source, "shard", False), "leave it out, or use one teacher"
            require(whole, f"{self.fields[name]}.shard", "be false in a router", True, remedy)
        routes = self.routes if isinstance(self.routes, Mapping) else {"": self.routes}
        for value, name in routes.items():
            condition = f"lead each value to one of {', '.join(self.sources)}"
            require(str(name) in self.sources, "teacher.routes", condition, f"{value}: {name}", "correct it")

    @property
    def sources(self) -> dict[str, TeacherSource]:
        """Every teacher by name, the default one last."""
        return {
            name: LocalTeacher(path=source, dtype=self.dtype) if isinstance(source, str) else source
            for name, source in self._given.items()
        }

    @property
    def _given(self) -> dict[str, TeacherSource | str]:
        every = {str(name): source for name, source in self.teachers.items()} | {DEFAULT: self.default}
        return {name: source for name, source in every.items() if source is not None}

    @property
    def fields(self) -> dict[str, str]:
        """What errors call each teacher's settings."""
        return {n: f"teacher.{DEFAULT}" if n == DEFAULT else f"teacher.teachers.{n}" for n in self.sources}

    @property
    def path(self) -> str:
        """Where the teachers lie."""
        return ", ".join(source.path for source in self.sources.values())

    @property
    def scores_given_ids(self) -> bool:
        """Whether every teacher does."""
        return all(getattr(source, "scores_given_ids", True) for source in self.sources.values())

    def check_temperature(self, temperature: float) -> None:
        """Refuse a scoring temperature that is not every teacher's.

        Raises:
            ConfigError: a teacher has another, or cannot score at it.
        """
        for name, source in self.sources.items():
            with self._naming(name):
                own = getattr(source, "scoring_temperature", None)
                same_temperature(own, temperature, "teacher.scoring_temperature")
                if hasattr(source, "check_temperature"):
                    source.check_temperature(temperature)

    @property
    def routing(self) -> Routing:
        """Which teacher a row names."""
        routes = {str(value): str(name) for value, name in self.routes.items()}
        return Routing(column=self.column, routes=routes, names=tuple(self.sources))

    def _naming(self, name: str) -> AbstractContextManager[None]:
        return naming(self.fields[name], by_path=isinstance(self._given[name], str))

    def shared_vocabulary(self, tokenizer: PreTrainedTokenizerBase, width: int) -> int:
        """Return how many ids all teachers share with a student of this tokenizer and width of logits.

        Raises:
            ConfigError: a teacher has another tokenizer, or does not answer.
        """
        for name, source in self.sources.items():
            with self._naming(name):
                width = shared_width(tokenizer, width, source)
        return width

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Refuse problems without a teacher, and a column that leads none to a teacher by name.

        Args:
            problems: those to train on, or some of them where they are made on the way.

        Raises:
            ConfigError: there is one, or the column is another.
        """
        routing = self.routing
        counts = Counter(routing.names[routing(problem)] for problem in problems)
        named = [name for name in routing.names if name != DEFAULT]
        if named and problems and not any(counts[name] for name in named):
            raise ConfigError(
                f"`teacher.column` must name one of {', '.join(named)} in some row, got {self.column!r}, which leads "
                f"all of {len(problems)} to teacher.default; correct the column or the names, or use teacher.routes"
            )
        if idle := [name for name in named if not counts[name]]:
            log.warning("no row of %d names teacher %s", len(problems), ", ".join(idle))
        log.info("rows by teacher: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))

    def load(self, loading: Loading) -> RoutedScorer:
        """Load every teacher.

        Raises:
            ConfigError: one that cannot be loaded; its settings are named in full.
        """
        teachers = {}
        for name, source in self.sources.items():
            with self._naming(name):
                teachers[name] = source.load(loading)
        follows = any(isinstance(teacher, Follows) for teacher in teachers.values())
        kind = FollowingScorer if follows else RoutedScorer
        return kind(teachers=teachers, routing=self.routing, fields=self.fields)
