"""Several teachers behind one: each row is scored by its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from opd_lightning.errors import ConfigError
from opd_lightning.loading import holding, scorers_of
from opd_lightning.protocols import Averaged, Follows, Scoring
from opd_lightning.scorer import Scorer
from opd_lightning.types import Problem, PromptBatch, Scores, TokenBatch, Want

DEFAULT = "default"
"""Name of the teacher of rows that name no other."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which teacher a problem's row names.

    Args:
        column: of the data.
        routes: from a value of the column to a teacher's name, where the value is none itself.
        names: of the teachers; the last may be :data:`DEFAULT`.
    """

    column: str
    routes: Mapping[str, str]
    names: tuple[str, ...]

    def __call__(self, problem: Problem) -> int:
        """Return the place of the problem's teacher among ``names``.

        Raises:
            ConfigError: the row has no such column or names no teacher, and there is no default.
        """
        cell = self._cell(problem)
        name = None if cell is None else self.routes.get(str(cell), str(cell))
        if name in self.names:
            return self.names.index(name)
        if DEFAULT in self.names:
            return self.names.index(DEFAULT)
        got = f"no {self.column}" if cell is None else f"{self.column}={cell!r:.80}"
        raise ConfigError(
            f"`teacher.column` must name a teacher in every row, got {got} in problem {problem.index}; use one of "
            f"{', '.join(self.names)}, lead the value to one by teacher.routes, or give teacher.default"
        )

    def _cell(self, problem: Problem) -> object:
        # Columns that every task knows are fields of a problem, and the others lie beside them.
        known = {name: getattr(problem, name) for name in ("difficulty", "answer", "response")}
        return problem.extra.get(self.column, known.get(self.column))


@dataclass(frozen=True, kw_only=True)
class RoutedScorer:
    """Has each row scored by its own teacher, and puts the answers back in the rows' order.

    Args:
        teachers: by name, in the order of ``routing.names``.
        routing: which one a problem's row names.
        fields: what errors call each teacher's settings, by name.
        rows: rows of the batch to score that are each teacher's; None before :meth:`routed`.
    """

    teachers: Mapping[str, Scoring]
    routing: Routing
    fields: Mapping[str, str]
    rows: tuple[tuple[int, ...], ...] | None = None

    @property
    def kind(self) -> str:
        """For people."""
        return ", ".join(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' names."""
        return self.routing.names

    @property
    def scores_given_ids(self) -> bool:
        """Whether every teacher does."""
        return all(getattr(teacher, "scores_given_ids", True) for teacher in self.teachers.values())

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """The models of those that are in this process."""
        return tuple(scorer for teacher in self.teachers.values() for scorer in scorers_of(teacher))

    def to(self, device: torch.device | str) -> RoutedScorer:
        """Move the weights of the teachers that have some here, in place."""
        for teacher in self.teachers.values():
            if hasattr(teacher, "to"):
                teacher.to(device)
        return self

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Have the weights of each teacher stay once they have come; those of one without a row do not come."""
        with ExitStack() as stack:
            for teacher in self.teachers.values():
                stack.enter_context(holding(teacher))
            yield

    def route(self, prompts: PromptBatch) -> Int[Tensor, " batch"]:
        """Return the place in ``names`` of each row's teacher, where the prompts are."""
        places = [self.routing(problem) for problem in prompts.problems]
        return torch.tensor(places, dtype=torch.long, device=prompts.ids.device)

    def routed(self, prompts: PromptBatch) -> RoutedScorer:
        """Return what scores responses to these prompts, in this order."""
        places = self.route(prompts).tolist()
        rows = tuple(tuple(i for i, p in enumerate(places) if p == place) for place in range(len(self.names)))
        return replace(self, rows=rows)

    @property
    def view(self) -> Callable[[PromptBatch], PromptBatch] | None:
        """Each row's prompt as its teacher sees it; None where all see the student's."""
        own = any(getattr(teacher, "view", None) is not None for teacher in self.teachers.values())
        return self._seen if own else None

    def _seen(self, prompts: PromptBatch) -> PromptBatch:
        parts: list[PromptBatch] = []
        order: list[int] = []
        for name, rows in self._split():
            view = getattr(self.teachers[name], "view", None)
            part = prompts.rows(list(rows))
            with naming(self.fields[name]):
                parts.append(part if view is None else view(part))
            order += rows
        width = max(part.ids.shape[1] for part in parts)
        back = torch.tensor(order).argsort()
        ids, mask = (
            torch.cat([pad(each, [width - each.shape[1], 0]) for each in side])[back]
            for side in ([part.ids for part in parts], [part.mask for part in parts])
        )
        return replace(prompts, ids=ids, mask=mask)

    @torch.no_grad()
    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Score the tokens. A teacher without a row among them is not asked.

        The entropy is None for all rows where some teacher of the router does not say it.

        Raises:
            ConfigError: hidden states are wanted, which are read by one model's head.
        """
        if want.hidden or want.full:
            raise ConfigError(
                "`support` must be selected ids with teacher=router, whose teachers have heads of their own, got the "
                "whole vocabulary; use support=teacher or support=student"
            )
        entropy = all(getattr(teacher, "gives_entropy", True) for teacher in self.teachers.values())
        want = replace(want, entropy=want.entropy and entropy)
        parts: list[Scores] = []
        order: list[int] = []
        for name, rows in self._split():
            part = list(rows)
            given = None if support_ids is None else support_ids[part]
            with naming(self.fields[name]):
                parts.append(self.teachers[name](tokens.rows(part), want, given))
            order += part
        return _joined(parts).rows(torch.tensor(order).argsort())

    def _split(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the teachers that have rows, with these."""
        if self.rows is None:
            raise ConfigError(
                "`teacher` must be told the prompts of the rows that it scores, got tokens alone; call routed(prompts)"
            )
        for name, rows in zip(self.names, self.rows, strict=True):
            if rows:
                yield name, rows


@dataclass(frozen=True, kw_only=True)
class FollowingScorer(RoutedScorer):
    """Several teachers, some of which change with the student."""

    def follow(self, student: Scoring, progress: float) -> None:
        """Let those take over from ``student``."""
        for teacher in self.teachers.values():
            if isinstance(teacher, Follows):
                teacher.follow(student, progress)

    def state_dict(self) -> dict[str, Any]:
        """Return what those hold that only the run's past could give them, by teacher."""
        return {name: teacher.state_dict() for name, teacher in self._averaged.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back from a checkpoint."""
        for name, teacher in self._averaged.items():
            if name in state:
                teacher.load_state_dict(state[name])

    @property
    def _averaged(self) -> dict[str, Averaged]:
        return {name: teacher for name, teacher in self.teachers.items() if isinstance(teacher, Averaged)}


def _joined(parts: Sequence[Scores]) -> Scores:
    """Return the rows of all parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    found = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Scores) if f.name != "full"}
    joined: dict[str, Any] = {n: torch.cat(values) for n, values in found.items() if values[0] is not None}
    return Scores(**joined)


@contextmanager
def naming(field: str, by_path: bool = False) -> Iterator[None]:
    """Have errors inside the block name a teacher's settings by ``field`` in place of ``teacher``.

    One that was given ``by_path`` has no settings of its own but that path, which ``field`` names.
    """
    try:
        yield
    except ConfigError as error:
        pattern, name = (r"teacher\.path\b", field) if by_path else (r"teacher\.(?=[a-z])", f"{field}.")
        raise type(error)(re.sub(rf"\b{pattern}", name, str(error))) from error
