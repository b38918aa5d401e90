"""Metrics of one collection: the rollouts, the teacher, the support, and a closer look at a few rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from opd_lightning.functional.divergence import log_mass
from opd_lightning.types import Experience, Finish, Graded, Origin, Rollout, Scores


@dataclass(frozen=True)
class CollectionReport:
    """Sums and counts of one collection on this rank, and its graded responses.

    ``sums[name] = (sum, count)``; a mean over all ranks is the ratio of their totals.
    """

    graded: Graded
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def means(self, total: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the means over all ranks; ``total`` sums a tensor over them. Empty ones are left out."""
        table = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=device)
        sums = total(table).cpu()
        return {name: float(s / n) for name, (s, n) in zip(self.sums, sums, strict=True) if n > 0}


def describe(
    graded: Graded,
    experience: Experience,
    probe: tuple[Experience, Scores] | None,
    taught: Mapping[str, Bool[Tensor, " batch"]] | None = None,
) -> CollectionReport:
    """Return the report of a collection.

    ``rollout/*`` and ``teacher/*`` are means over the tokens that the student wrote, and the responses with any;
    gold solutions and teacher text beside them would hide what the student does. ``student/*``, the
    log-ratio ``log T - log S`` of the taken token (``teacher/log_ratio``, nats), and the masses of the
    support come from the probed rows, since a loss on few tokens computes no normaliser.

    ``taught`` marks each teacher's rows, by name, where there are several. Of each, ``teacher/<name>/share`` is
    its share of the student's responses, ``accuracy`` theirs, and ``logp``, ``entropy`` and ``log_ratio`` are as
    those of all. They are there for a teacher without a row too, since every rank must sum the same table.
    """
    rollout = experience.rollout
    mask = _written_by_student(rollout)
    own = mask.any(-1)
    graded_own = graded.rows(own.nonzero().flatten().tolist())
    sums = {
        "rollout/length": _over(graded_own.lengths),
        "rollout/truncation": _over(graded_own.truncated),
        "rollout/repetition": _over(graded_own.repetition),
        "rollout/repetitive": _over(graded_own.repetitive),
        "rollout/eos": _over(rollout.finish[own] == Finish.EOS),
        "rollout/accuracy": _over(graded_own.correct[graded_own.correct.isfinite()]),
        "rollout/behavior_logp": _over(rollout.behavior_logp[mask]),
    }
    if experience.teacher_entropy is not None:
        sums["teacher/entropy"] = _over(experience.teacher_entropy[mask])
    if experience.teacher_taken_logp is not None:
        sums["teacher/logp"] = _over(experience.teacher_taken_logp[mask])
    if probe is not None:
        sums |= _probed(*probe)
    for name, rows in (taught or {}).items():
        share = {"share": (float((own & rows).sum()), float(own.sum()))}
        found = share | _of_teacher(rows, graded, experience, probe)
        sums |= {f"teacher/{name}/{quantity}": value for quantity, value in found.items()}
    return CollectionReport(graded, sums)


def _of_teacher(
    rows: Bool[Tensor, " batch"],
    graded: Graded,
    experience: Experience,
    probe: tuple[Experience, Scores] | None,
) -> dict[str, tuple[float, float]]:
    """Return the sums over one teacher's rows."""
    mask = _written_by_student(experience.rollout) & rows.unsqueeze(-1)
    correct = graded.rows(mask.any(-1).nonzero().flatten().tolist()).correct
    sums = {"accuracy": _over(correct[correct.isfinite()])}
    if experience.teacher_entropy is not None:
        sums["entropy"] = _over(experience.teacher_entropy[mask])
    if experience.teacher_taken_logp is not None:
        sums["logp"] = _over(experience.teacher_taken_logp[mask])
    if probe is not None:
        seen, student = probe
        if student.taken_logp is not None and seen.teacher_taken_logp is not None:
            ratio = seen.teacher_taken_logp - student.taken_logp
            sums["log_ratio"] = _over(ratio[mask[: len(ratio), : ratio.shape[1]]])
    return sums


def _probed(rows: Experience, student: Scores) -> dict[str, tuple[float, float]]:
    mask = _written_by_student(rows.rollout)
    sums: dict[str, tuple[float, float]] = {}
    if student.entropy is not None:
        sums["student/entropy"] = _over(student.entropy[mask])
    if student.taken_logp is not None:
        sums["student/logp"] = _over(student.taken_logp[mask])
        if rows.teacher_taken_logp is not None:
            sums["teacher/log_ratio"] = _over((rows.teacher_taken_logp - student.taken_logp)[mask])
    if student.support_logp is not None:
        assert rows.support_valid is not None
        assert rows.support_teacher_logp is not None
        sums["support/student_mass"] = _over(log_mass(student.support_logp, rows.support_valid)[mask].exp())
        sums["support/teacher_mass"] = _over(
            log_mass(rows.support_teacher_logp, rows.support_valid)[mask].exp()
        )
        assert rows.support_ids is not None
        covers = ((rows.support_ids == rows.rollout.ids.unsqueeze(-1)) & rows.support_valid).any(-1)
        sums["support/covers_taken"] = _over(covers[mask])
    return sums


def _written_by_student(rollout: Rollout) -> Bool[Tensor, "batch time"]:
    """Return the tokens of the student's, in the loss or not."""
    return rollout.mask & (rollout.origin == Origin.STUDENT)


def _over(values: Tensor) -> tuple[float, float]:
    return float(values.double().sum()), float(values.numel())
