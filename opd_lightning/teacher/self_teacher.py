"""The student's own model as its teacher: shown a solution, or averaged over the run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.chat import encode, left_padded
from opd_lightning.errors import ConfigError, require
from opd_lightning.layers import compile_layers
from opd_lightning.loading import FrozenScorer, Loading, SharedScorer
from opd_lightning.protocols import Scoring
from opd_lightning.schedule import Schedule, value_at, within
from opd_lightning.scorer import Scorer
from opd_lightning.types import Problem, PromptBatch

_WEIGHTS = ("initial", "live", "ema")
_SOLUTIONS = ("response", "answer")


@dataclass(frozen=True, kw_only=True)
class SelfTeacher:
    """T(. | x, y<t) = M(. | x + context, y<t) with the student's own model M (arXiv 2601.18734, 2601.19897).

    The teacher scores the student's response behind a prompt whose last user message ends with
    ``context``. M is the starting student (``weights="initial"``), the student as it is now (``"live"``,
    no copy), or the average ``M <- decay * M + (1 - decay) * student`` over optimizer steps (``"ema"``; of
    the adapters where the student has some) and is part of the run's checkpoints.

    Args:
        path: the student's; another model is accepted with ``weights="initial"``.
        dtype: torch dtype of the weights; an average needs at least float32.
        scoring_temperature: None for the student's, which is the only one that is accepted.
        weights: ``"initial"``, ``"live"`` or ``"ema"``.
        decay: of the average, in [0, 1], a number or a schedule; None with other weights.
        context: text with ``{solution}`` or ``{answer}`` or without; None for the student's own prompt.
        solution: which text of a problem ``{solution}`` is, ``"response"`` or ``"answer"``.
        max_prompt_tokens: longest prompt with the context.

    Raises:
        ConfigError: a field out of its range or that nothing reads, or a teacher that would only say what the
            student says: its weights, live or as they started, under the student's own prompt.
    """

    path: str
    dtype: str
    scoring_temperature: float | None
    weights: str
    decay: float | Schedule | None
    context: str | None
    solution: str
    max_prompt_tokens: int

    def __post_init__(self) -> None:
        known = self.weights in _WEIGHTS
        require(known, "teacher.weights", f"be one of {_WEIGHTS}", self.weights, "use initial")
        self._check_decay()
        text = self.context is None or (isinstance(self.context, str) and bool(self.context.strip()))
        require(text, "teacher.context", "be a text or null", self.context, "write one with {solution}")
        known = self.solution in _SOLUTIONS
        require(known, "teacher.solution", f"be one of {_SOLUTIONS}", self.solution, "use response")
        longest = self.max_prompt_tokens
        whole = isinstance(longest, int) and longest >= 1
        require(whole, "teacher.max_prompt_tokens", "be a whole number of at least 1", longest, "use 1024")
        require(
            self.weights == "ema" or self.context is not None,
            "teacher.context",
            f"be a text with teacher.weights={self.weights}: under one prompt the teacher would be the student, "
            "now or as it started, which teaches nothing",
            self.context,
            "use teacher=self, or teacher=ema",
        )

    def _check_decay(self) -> None:
        """Refuse an average without a decay, and a decay without an average."""
        if self.weights == "ema":
            holds = within(self.decay, 0.0, 1.0)
            require(holds, "teacher.decay", "be in [0, 1] with teacher.weights=ema", self.decay, "use 0.999")
        else:
            condition = f"be null with teacher.weights={self.weights}, which has no average"
            remedy = "use teacher.weights=ema, or leave it out"
            require(self.decay is None, "teacher.decay", condition, self.decay, remedy)

    def load(self, loading: Loading) -> FrozenScorer:
        """Return the teacher; its view is the prompt with the context.

        Raises:
            ConfigError: another scoring temperature than the student's; a problem without a solution; a
                path or dtype that these weights cannot have.
        """
        loading.check_temperature(self.scoring_temperature, "teacher.scoring_temperature")
        view = None
        if self.context is not None:
            view = PrivilegedView(
                tokenizer=loading.tokenizer,
                context=self.context,
                solution=self.solution,
                max_tokens=self.max_prompt_tokens,
            )
            view.encode(loading.problems)
        if self.weights == "initial":
            return FrozenScorer(loading.frozen(self.path, "teacher.path", self.dtype), view)
        require(
            self.path == loading.student_path,
            "teacher.path",
            f"be the student's with teacher.weights={self.weights}",
            self.path,
            "leave it ${student.path}, or use teacher=self teacher.weights=initial",
        )
        if self.weights == "live":
            require(
                self.dtype == loading.student_dtype,
                "teacher.dtype",
                f"be the student's {loading.student_dtype} with teacher.weights=live",
                self.dtype,
                "leave it ${student.dtype}",
            )
            return LiveScorer(loading.student, view)
        assert self.decay is not None
        averaged = tuple(name for name, p in loading.student.model.named_parameters() if p.requires_grad)
        return AveragedScorer(self._copy(loading, averaged), view, decay=self.decay, averaged=averaged)

    def _copy(self, loading: Loading, averaged: Sequence[str]) -> Scorer:
        """Return a frozen copy of the student, adapters and all."""
        student = loading.student
        model = copy.deepcopy(student.model).eval().requires_grad_(False)
        if loading.compiled:
            compile_layers(model)
        if self.dtype != loading.student_dtype:
            model = model.to(getattr(torch, self.dtype))  # type: ignore[arg-type]
        held = dict(model.named_parameters())
        # In 16 bits a thousandth of a change is lost in rounding, and the average would stand still.
        wide = all(torch.finfo(held[name].dtype).bits >= 32 for name in averaged)
        require(wide, "teacher.dtype", "be at least float32 for a moving average", self.dtype, "use float32")
        return Scorer(model, student.vocab, student.scratch, student.temperature, student.layout)


@dataclass(frozen=True, kw_only=True)
class PrivilegedView:
    """Prompts as a teacher sees them: the last user message ends with a text that the student is not shown."""

    tokenizer: PreTrainedTokenizerBase
    context: str
    solution: str
    max_tokens: int

    def __call__(self, prompts: PromptBatch) -> PromptBatch:
        """Return the same problems and seeds with the changed prompts, left-padded.

        Raises:
            ConfigError: a problem without what the context shows, or a prompt over the limit.
        """
        ids, mask = left_padded(self.encode(prompts.problems))
        device = prompts.ids.device
        return replace(prompts, ids=ids.to(device), mask=mask.to(device))

    def encode(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Return each changed prompt's ids."""
        rows = [encode(self.tokenizer, self._messages(problem)) for problem in problems]
        longest = max(map(len, rows), default=0)
        require(
            longest <= self.max_tokens,
            "teacher.max_prompt_tokens",
            f"cover the prompts with their context, the longest of which has {longest} tokens",
            self.max_tokens,
            f"use {longest} or more",
        )
        return rows

    def _messages(self, problem: Problem) -> list[dict[str, Any]]:
        messages = [dict(message) for message in problem.messages]
        asked = [message for message in messages if message["role"] == "user"]
        if not asked:
            raise ConfigError(
                f"`task` must give each prompt a user's message for teacher.context to end, got none for problem "
                f"{problem.index}; change the row, or use teacher.context=null"
            )
        asked[-1]["content"] = str(asked[-1]["content"]) + self._shown(problem)
        return messages

    def _shown(self, problem: Problem) -> str:
        # Replaced and not formatted: a text about mathematics has braces of its own.
        for place, name in (("{solution}", self.solution), ("{answer}", "answer")):
            value = getattr(problem, name)
            if place in self.context and not value:
                raise ConfigError(
                    f"`task` must give each training problem {_article(name)} for {place} of teacher.context, got none "
                    f"for problem {problem.index}; add {name!r} to each row, or change teacher.context or "
                    "teacher.solution"
                )
        text = self.context.replace("{answer}", problem.answer or "")
        return text.replace("{solution}", getattr(problem, self.solution) or "")


def _article(name: str) -> str:
    return f"an {name}" if name == "answer" else f"a {name}"


class LiveScorer(SharedScorer):
    """The student as it is now, under a prompt of the teacher's own."""

    def follow(self, student: Scoring, progress: float) -> None:
        """Do nothing: these are the student's weights."""


@dataclass(frozen=True, kw_only=True)
class AveragedScorer(FrozenScorer):
    """A copy of the student that moves towards it: ``M <- decay * M + (1 - decay) * student``.

    ``averaged`` names the weights that move: those that the student trains.
    """

    decay: float | Schedule
    averaged: tuple[str, ...]

    @torch.no_grad()
    def follow(self, student: Scoring, progress: float) -> None:
        """Take one step towards ``student``, on what it trains."""
        assert isinstance(student, Scorer)
        decay = value_at(self.decay, progress)
        held = dict(self.scorer.model.named_parameters())
        now = dict(student.model.named_parameters())
        for name in self.averaged:
            mine = held[name]
            mine.mul_(decay).add_(now[name].to(mine), alpha=1 - decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averaged weights by name."""
        held = dict(self.scorer.model.named_parameters())
        return {name: held[name].detach().to("cpu", copy=True) for name in self.averaged}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the averaged weights back."""
        held = dict(self.scorer.model.named_parameters())
        for name, weight in state.items():
            held[name].copy_(weight)
