"""Responses that begin with somebody else's text and that the student ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from opd_lightning.protocols import Writer, Writers
from opd_lightning.rollout._parts import (
    Drawing,
    Source,
    check_count,
    check_share,
    check_source,
    given_text,
    groups,
    origin_of,
    tokens,
    writer_of,
)
from opd_lightning.schedule import Schedule, value_at
from opd_lightning.types import Finish, Generation, Origin, PromptBatch, Rollout

# A product such as 0.29 * 100 is just below the whole number that it stands for.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class TeacherPrefix(Drawing):
    """Off-policy guidance of TrOPD (arXiv 2606.01249): the student goes on from a prefix of the teacher's.

    Each prompt has one teacher response y of n tokens. Its first floor(fraction * n) tokens stand before
    each of the ``samples`` responses, which the student continues. Prefix tokens are in the loss once a
    prompt: of a prompt's responses only the first has them inside its horizon, as in the method's code,
    where one prefix and four continuations share one token mean.

    Args:
        samples: continuations per prompt.
        text: who writes the prefix, ``"teacher"`` (origin TEACHER) or ``"data"`` (origin DATA).
        fraction: share of the response that is given, in [0, 1]; a number or a schedule.
        max_new_tokens: longest response, prefix and continuation together.
        temperature, top_p, top_k, min_p: of the student.
        teacher_temperature: of the teacher; 0 takes its likeliest token.

    Raises:
        ConfigError: a number out of its range.
    """

    samples: int
    text: Source
    fraction: float | Schedule
    teacher_temperature: float

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        super().__post_init__()
        check_source(self.text, "text", self.teacher_temperature)
        check_share(self.fraction, "fraction", "use 0 for the student's text alone")

    @property
    def writers(self) -> frozenset[Writer]:
        """Who is asked to write."""
        return frozenset({"student", writer_of(self.text)})

    def __call__(self, prompts: PromptBatch, writers: Writers, progress: float, top_ids: int) -> Rollout:
        """Return the rollout, under the original prompts.

        A prefix that has its stop token, or fills ``max_new_tokens``, has no continuation. The prefix's
        ``behavior_logp`` is the teacher's (0 for data). No top ids: prefix tokens have none of the student's.
        """
        budget = tokens(self.max_new_tokens, progress)
        text = given_text(self.text, prompts, writers, budget, self.teacher_temperature)
        lengths = text.mask.sum(-1)
        kept = (lengths * value_at(self.fraction, progress) + _ROUNDING).floor().long()
        ended = (kept == lengths) & (text.finish == Finish.EOS)
        repeated, prefix = prompts.repeat(self.samples), text.rows(groups(prompts, self.samples))
        kept, ended = (x.repeat_interleave(self.samples) for x in (kept, ended))
        rollout = _prefixed(repeated, prefix, kept, ended, budget, origin_of(self.text))
        open_rows = (~ended & (kept < budget)).nonzero()[:, 0]
        if len(open_rows):
            asked = extended(repeated.rows(open_rows), prefix.ids[open_rows], kept[open_rows])
            drawn = writers.student(asked, self.sampling(budget - int(kept[open_rows].amin())))
            rollout = _continued(rollout, open_rows, kept[open_rows], drawn)
        # Every continuation repeats the prefix; it is one text, and one row teaches it.
        first = torch.arange(len(repeated), device=kept.device) % self.samples == 0
        inside = first[:, None] | ~_before(kept, budget)
        longest = int(rollout.mask.any(0).sum())
        cut = {
            name: getattr(rollout, name)[:, :longest] for name in ("ids", "mask", "origin", "behavior_logp")
        }
        return replace(rollout, horizon=inside[:, :longest], group=groups(prompts, self.samples), **cut)


def extended(
    prompts: PromptBatch, ids: Int[Tensor, "batch time"], kept: Int[Tensor, " batch"]
) -> PromptBatch:
    """Return the prompts with the first ``kept`` of ``ids`` behind them, left-padded as before."""
    joined = torch.cat([prompts.ids, ids], 1)
    mask = torch.cat([prompts.mask, _before(kept, ids.shape[1])], 1)
    order = mask.long().argsort(dim=1, stable=True)  # padding first, tokens in their order
    joined, mask = joined.gather(1, order), mask.gather(1, order)
    width = int(mask.sum(-1).amax())
    return replace(prompts, ids=joined[:, -width:], mask=mask[:, -width:])


def _before(count: Int[Tensor, " batch"], width: int) -> Bool[Tensor, "batch time"]:
    return torch.arange(width, device=count.device) < count[:, None]


def _prefixed(
    prompts: PromptBatch,
    text: Generation,
    kept: Int[Tensor, " batch"],
    ended: Bool[Tensor, " batch"],
    budget: int,
    origin: Origin,
) -> Rollout:
    """Return responses that are their prefixes alone, with room for ``budget`` tokens."""
    mask = _before(kept, budget)
    room = budget - text.ids.shape[1]
    ids = torch.nn.functional.pad(text.ids, [0, room])
    logp = torch.nn.functional.pad(text.behavior_logp, [0, room])
    return Rollout(
        prompt=prompts,
        ids=ids * mask,
        mask=mask,
        origin=mask.long() * int(origin),
        horizon=mask,
        behavior_logp=logp.masked_fill(~mask, 0.0),
        finish=torch.where(ended, int(Finish.EOS), int(Finish.LENGTH)),
        group=torch.zeros_like(kept),
    )


def _continued(
    rollout: Rollout, rows: Int[Tensor, " open"], kept: Int[Tensor, " open"], drawn: Generation
) -> Rollout:
    """Return the rollout with ``drawn`` behind the prefixes of ``rows``, as far as there is room."""
    width = rollout.ids.shape[1]
    place = kept[:, None] + torch.arange(drawn.ids.shape[1], device=kept.device)
    fits = drawn.mask & (place < width)
    row, place = rows[:, None].expand_as(place)[fits], place[fits]
    changed: dict[str, Any] = {
        "ids": rollout.ids.index_put((row, place), drawn.ids[fits]),
        "behavior_logp": rollout.behavior_logp.index_put((row, place), drawn.behavior_logp[fits]),
        "mask": rollout.mask.index_put((row, place), torch.ones_like(place, dtype=torch.bool)),
        "origin": rollout.origin.index_put((row, place), torch.full_like(place, Origin.STUDENT)),
    }
    cut = drawn.mask.sum(-1) > fits.sum(-1)
    finish = rollout.finish.index_put((rows,), drawn.finish.masked_fill(cut, Finish.LENGTH))
    return replace(rollout, finish=finish, **changed)
