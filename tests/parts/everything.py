"""Every part of the configuration in an objective of its own, and numbers for all that it may read."""

from __future__ import annotations

from dataclasses import replace

import torch
from hydra import compose, initialize_config_dir
from tabular import World as Tables
from tabular import stale, with_reference

from opd_lightning.building import objective_from
from opd_lightning.mask.special_tokens import SpecialTokens
from opd_lightning.objective import Objective
from opd_lightning.paths import CONF_DIR
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Experience, Origin, Scores


def _names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))


LOSSES = [
    *([f"estimator={name}"] for name in _names("estimator")),
    *(["estimator=token", f"reward={name}"] for name in _names("reward")),
    *(["estimator=token", f"regularizer=[{name}]"] for name in _names("regularizer")),
]
CHOICES = [
    *(["estimator=token", f"mask=[{name}]"] for name in _names("mask")),
    *(["estimator=topk", f"reduction={name}"] for name in _names("reduction")),
    ["estimator=discounted", "estimator.gamma=0.9", "estimator.normalise=length_whiten"],
]


def composed(parts: list[list[str]]) -> dict[str, Objective]:
    """Objectives by the last word of their overrides, as the command composes them; id 1 is the special token."""
    made = {}
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        for part in parts:
            whole = objective_from(compose("train", [*part, "support=teacher"]))
            masks = {
                name: replace(mask, ids=(1,)) if isinstance(mask, SpecialTokens) else mask
                for name, mask in whole.masks.items()
            }
            made[part[-1]] = replace(whole, masks=masks)
    return made


def seen(tables: Tables, objective: Objective, k: int = 3) -> tuple[Scores, Experience]:
    """Scores and experience on the teacher's top ``k``; a third of the first tokens is each of three origins'."""
    table = stale(tables, seed=3)
    table[table <= -1e5] = 0.0
    scores, experience = with_reference(tables, table, TeacherTopK(k=k))
    origin = tables.rollout.origin.clone()
    origin[::3, 0], origin[1::3, 0] = Origin.TEACHER, Origin.DATA
    collected = tables.taken(table.log_softmax(-1))
    draw = torch.Generator().manual_seed(0)
    student, teacher, divergence = torch.rand(3, *tables.ids.shape, generator=draw, dtype=torch.float64)
    return scores, replace(
        experience,
        rollout=replace(tables.rollout, origin=origin, behavior_logp=collected - 0.1),
        collected_logp=collected,
        collected_entropy=student,
        teacher_entropy=teacher,
        collected_full={term: divergence for term in objective.needs.collected_full},
        progress=0.5,
    )
