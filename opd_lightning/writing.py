"""Who writes response tokens: the student, the teacher, the data, or both models together."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.errors import ConfigError
from opd_lightning.protocols import Combine, Engine, Scoring, Writer, Writers
from opd_lightning.scorer import Scorer
from opd_lightning.types import Finish, Generation, PromptBatch, Sampling


def writers_for(
    engine: Engine,
    student: Scorer,
    teacher: Scoring,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: tuple[int, ...],
    wanted: frozenset[Writer],
) -> Writers:
    """Return everyone who can write, all bound to the same stop ids and shared vocabulary.

    Raises:
        ConfigError: ``wanted`` names a writer that this teacher or engine cannot be.
    """
    local = getattr(teacher, "scorer", None)
    if wanted & {"teacher", "mixed"} and not isinstance(local, Scorer):
        raise ConfigError(
            f"`rollout` must have one teacher in this process to write tokens, got {type(teacher).__name__}; "
            "use teacher=builtin with teacher.path=…, or rollout=top_p"
        )
    if "mixed" in wanted and not hasattr(engine, "generate_mixed"):
        raise ConfigError(
            f"`engine` must be able to draw from two models at once, got {type(engine).__name__}; "
            "use engine=transformers"
        )
    bound = partial(_bounded, stop_ids=stop_ids, vocab=student.vocab)
    view = getattr(teacher, "view", None) or (lambda prompts: prompts)
    awake = getattr(teacher, "awake", nullcontext)

    def by_student(prompts: PromptBatch, sampling: Sampling) -> Generation:
        return engine.generate(student.model, prompts, bound(sampling))

    def by_teacher(prompts: PromptBatch, sampling: Sampling) -> Generation:
        assert isinstance(local, Scorer)
        with awake():
            return engine.generate(local.model, view(prompts), bound(sampling))

    def by_both(prompts: PromptBatch, sampling: Sampling, combine: Combine) -> Generation:
        assert isinstance(local, Scorer)
        draw = engine.generate_mixed  # type: ignore[attr-defined]
        with awake():
            return draw(student.model, local.model, prompts, bound(sampling), combine)  # type: ignore[no-any-return]

    return Writers(
        student=by_student,
        teacher=by_teacher,
        gold=partial(gold_responses, tokenizer=tokenizer, stop_id=stop_ids[0]),
        mixed=by_both,
    )


@dataclass
class Budget:
    """How long responses may be now: ``share`` of what the rollout asks for, but ``least`` tokens.

    Mutable, one a collector: an alarm shortens the collections that follow.
    """

    share: float = 1.0
    least: int = 1


def shortened(writers: Writers, share: float, least: int) -> Writers:
    """Return the writers, of which the student, alone or mixed, writes ``share`` of the tokens it is asked for.

    But ``least`` tokens, as far as so many are asked for. What ends there was stopped early and not truncated.
    """
    if share >= 1:
        return writers

    def shorter(write: Callable[..., Generation]) -> Callable[..., Generation]:
        def written(prompts: PromptBatch, sampling: Sampling, *more: Any) -> Generation:
            asked = sampling.max_new_tokens
            drawn = write(prompts, replace(sampling, max_new_tokens=_part(asked, share, least)), *more)
            cut = drawn.finish == Finish.LENGTH
            return replace(drawn, finish=drawn.finish.masked_fill(cut, Finish.HORIZON))

        return written

    return replace(writers, student=shorter(writers.student), mixed=shorter(writers.mixed))


def _part(asked: int, share: float, least: int) -> int:
    return min(asked, max(least, math.ceil(share * asked)))


def counted(writers: Writers, tell: Callable[[Writer, PromptBatch, Generation], None]) -> Writers:
    """Return the writers, telling ``tell`` what each generates behind which prompts; gold text is not generated."""

    def telling(writer: Writer, write: Callable[..., Generation]) -> Callable[..., Generation]:
        def written(prompts: PromptBatch, *asked: Any) -> Generation:
            drawn = write(prompts, *asked)
            tell(writer, prompts, drawn)
            return drawn

        return written

    names: tuple[Writer, ...] = ("student", "teacher", "mixed")
    return replace(writers, **{name: telling(name, getattr(writers, name)) for name in names})


def _bounded(sampling: Sampling, stop_ids: tuple[int, ...], vocab: int) -> Sampling:
    return replace(sampling, stop_ids=stop_ids, vocab=vocab)


def gold_responses(prompts: PromptBatch, *, tokenizer: PreTrainedTokenizerBase, stop_id: int) -> Generation:
    """Return the data's own responses as a generation that ends with the stop token.

    Raises:
        ConfigError: a problem without a response.
    """
    texts = [problem.response for problem in prompts.problems]
    for problem, text in zip(prompts.problems, texts, strict=True):
        if not text:
            raise ConfigError(
                f"`task` must give each training problem a gold response for this rollout, got none for problem "
                f"{problem.index}; add a `response` to each row, or let the teacher write: rollout.text=teacher "
                "(rollout.gold=teacher for rollout=mixture)"
            )
    rows = [_encode(tokenizer, str(text), stop_id) for text in texts]
    longest, device = max(map(len, rows)), prompts.ids.device
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(longest, device=device) < lengths.unsqueeze(-1)
    return Generation(
        ids=ids,
        mask=mask,
        behavior_logp=torch.zeros(ids.shape, device=device),
        finish=torch.full((len(rows),), Finish.EOS, device=device),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, stop_id: int) -> list[int]:
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return ids if ids and ids[-1] == stop_id else [*ids, stop_id]
