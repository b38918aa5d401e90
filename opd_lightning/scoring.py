"""Rollouts to experience: one forward of each model over the responses, and the support chosen from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.loading import holding
from opd_lightning.objective import Objective
from opd_lightning.protocols import Routes, Scoring
from opd_lightning.scorer import Scorer
from opd_lightning.types import (
    Candidates,
    Experience,
    FullTerm,
    PromptBatch,
    Rollout,
    Scores,
    TokenBatch,
    Want,
)


@dataclass(frozen=True, kw_only=True)
class ScoringPass:
    """Has every model say what the objective needs of it, some responses in one forward.

    Args:
        teacher: scores the tokens; where it has a method ``view``, under a prompt of its own, and where it is
            several (:class:`~opd_lightning.protocols.Routes`), each row by its own.
        reference: the frozen starting student; None where no part needs one.
        objective: what the parts need.
        rows: responses in one forward.
        tokens: in place of ``rows``, the most tokens of a forward, padding included, under the student's
            prompts; a row that is longer goes alone.
    """

    teacher: Scoring
    reference: Scoring | None
    objective: Objective
    rows: int
    tokens: int | None = None

    def __call__(self, student: Scorer, rollout: Rollout) -> Experience:
        """Score all rows, those of like length together, and return them in the rollout's order."""
        lengths = rollout.prompt.mask.sum(-1) + rollout.lengths
        order = torch.argsort(lengths, stable=True)
        sizes = self.rows if self.tokens is None else _fitting(lengths[order].tolist(), self.tokens)
        with holding(self.teacher):
            parts = [self._score(student, rollout.rows(rows)) for rows in order.split(sizes)]
        back = torch.argsort(order)

        def together(read: Callable[[Experience], Tensor]) -> Tensor:
            return torch.cat([read(part) for part in parts])[back]

        joined = {
            f.name: together(lambda part, name=f.name: getattr(part, name))  # type: ignore[misc]
            for f in fields(Experience)
            if isinstance(getattr(parts[0], f.name), Tensor)
        }
        full = {
            term: together(lambda part, term=term: part.collected_full[term])  # type: ignore[misc]
            for term in parts[0].collected_full
        }
        return Experience(rollout=rollout, collected_full=full, **joined)  # type: ignore[arg-type]

    def _score(self, student: Scorer, rollout: Rollout) -> Experience:
        needs = self.objective.needs
        own = self._student(student, rollout)
        given, student_top = self._given(rollout, own)
        teacher_full = any(term.target == "teacher" for term in needs.collected_full)
        want = Want(
            taken=True,
            entropy=True,
            support="exact",
            top=needs.teacher_top,
            hidden=needs.full or teacher_full,
        )
        teacher = self.teacher.routed(rollout.prompt) if isinstance(self.teacher, Routes) else self.teacher
        taught = teacher(teacher_tokens(teacher, rollout), want, given)
        candidates = Candidates(taken=rollout.ids, teacher_top=taught.top_ids, student_top=student_top)
        support: dict[str, Tensor] = {}
        if needs.support and not needs.full:
            ids, valid = self.objective.support(candidates)
            _check_ids(ids, valid & rollout.mask.unsqueeze(-1), student.vocab)
            support = {"support_ids": ids, "support_valid": valid & rollout.mask.unsqueeze(-1)}
            support["support_teacher_logp"] = _look_up(ids, support["support_valid"], taught, given)
        referred = self._reference(rollout, support.get("support_ids"))
        return Experience(
            rollout=rollout,
            share=torch.zeros_like(rollout.behavior_logp),
            teacher_taken_logp=taught.taken_logp,
            teacher_entropy=taught.entropy,
            teacher_hidden=taught.hidden if needs.full else None,
            collected_logp=None if own is None else own.taken_logp,
            collected_entropy=None if own is None else own.entropy,
            collected_full=self._compare(student, rollout.mask, own, taught, referred),
            reference_taken_logp=referred.taken_logp,
            reference_support_logp=referred.support_logp,
            reference_hidden=referred.hidden if needs.reference_hidden else None,
            **support,  # type: ignore[arg-type]
        )

    def _student(self, student: Scorer, rollout: Rollout) -> Scores | None:
        """What the engine did not give: the untruncated student, and top ids where it has none."""
        needs = self.objective.needs
        known = 0 if rollout.top_ids is None else rollout.top_ids.shape[-1]
        top = needs.student_top if needs.student_top > known else 0
        want = Want(
            taken=needs.collected_logp,
            entropy=needs.collected_entropy,
            top=top,
            hidden=bool(needs.collected_full),
        )
        return None if want == Want() else student(rollout.tokens, want)

    def _given(
        self, rollout: Rollout, own: Scores | None
    ) -> tuple[Int[Tensor, "batch time g"], Tensor | None]:
        """Return the ids that the teacher must score beside its own top, and the student's top among them."""
        count, taken = self.objective.needs.student_top, rollout.ids.unsqueeze(-1)
        if not count:
            return taken, None
        chosen = rollout.top_ids if own is None or own.top_ids is None else own.top_ids
        assert chosen is not None
        return torch.cat([taken, chosen[..., :count]], -1), chosen[..., :count]

    def _reference(self, rollout: Rollout, support_ids: Tensor | None) -> Scores:
        needs = self.objective.needs
        if not needs.reference:
            return Scores()
        assert self.reference is not None
        compared = any(term.target == "reference" for term in needs.collected_full)
        want = Want(
            taken=needs.reference_taken,
            support="exact" if needs.reference_support and support_ids is not None else "none",
            hidden=needs.reference_hidden or compared,
        )
        return self.reference(rollout.tokens, want, support_ids)

    def _compare(
        self,
        student: Scorer,
        mask: Bool[Tensor, "batch time"],
        own: Scores | None,
        taught: Scores,
        referred: Scores,
    ) -> dict[FullTerm, Float[Tensor, "batch time"]]:
        """Return the divergences over the whole vocabulary that parts asked for at collection."""
        hidden = {"teacher": taught.hidden, "reference": referred.hidden}
        compared: dict[FullTerm, Tensor] = {}
        for term in self.objective.needs.collected_full:
            other = hidden[term.target]
            assert own is not None
            assert own.hidden is not None
            assert other is not None
            values = student.compare(own.hidden[mask], other[mask], term)
            compared[term] = values.new_zeros(mask.shape).index_put(torch.where(mask), values)
        return compared


def _fitting(lengths: Sequence[int], budget: int) -> list[int]:
    """Return sizes of consecutive groups, the largest with ``rows * longest <= budget``; lengths ascend."""
    sizes: list[int] = []
    for length in lengths:
        if sizes and (sizes[-1] + 1) * length <= budget:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes


def teacher_tokens(teacher: Scoring, rollout: Rollout) -> TokenBatch:
    """Return the rollout's tokens behind the prompt that the teacher sees."""
    view: Callable[[PromptBatch], PromptBatch] | None = getattr(teacher, "view", None)
    return rollout.tokens if view is None else replace(rollout, prompt=view(rollout.prompt)).tokens


def _check_ids(ids: Int[Tensor, "batch time k"], valid: Bool[Tensor, "batch time k"], vocab: int) -> None:
    """Refuse ids that the student's head does not have.

    Raises:
        ConfigError: a teacher that is wider than the student gave ids of its own.
    """
    largest = int(torch.where(valid, ids, 0).max()) if ids.numel() else 0
    require(
        largest < vocab,
        "support",
        f"hold ids below the student's {vocab}",
        largest,
        "cut the teacher to the shared vocabulary before it ranks its top ids",
    )


def _look_up(
    ids: Int[Tensor, "batch time k"],
    valid: Bool[Tensor, "batch time k"],
    taught: Scores,
    given: Int[Tensor, "batch time g"],
) -> Float[Tensor, "batch time k"]:
    """Return the teacher's log-probs at selected ids.

    Raises:
        ConfigError: the support chose an id that is not among its candidates, so that nobody scored it.
    """
    assert taught.support_logp is not None
    known_ids, known_logp = given, taught.support_logp
    if taught.top_ids is not None and taught.top_logp is not None:
        known_ids = torch.cat([known_ids, taught.top_ids], -1)
        known_logp = torch.cat([known_logp, taught.top_logp], -1)
    same = ids.unsqueeze(-1) == known_ids.unsqueeze(-2)
    if bool((valid & ~same.any(-1)).any()):
        raise ConfigError(
            "`support` must choose among its candidates (the taken token and the top ids that it declares in "
            "`needs`), got another id; declare more top ids, or mark that entry invalid"
        )
    where = same.to(torch.uint8).argmax(-1)
    return known_logp.gather(-1, where)
