"""Graded responses: what is measured of their tokens, and where it goes."""

import pytest
import torch
from tiny import random_rollout

from opd_lightning.diagnostics.collection import describe
from opd_lightning.diagnostics.responses import ResponseMetrics
from opd_lightning.grades import grade
from opd_lightning.models import load_tokenizer
from opd_lightning.task.word_problems import WordProblems
from opd_lightning.types import Experience, Finish, Problem, PromptBatch, Rollout


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Nine equal tokens (2 eight-grams, 1 of them new); twelve different ones; three; padding is all equal."""
    rows = [[7] * 9, list(range(10, 22)), [7] * 3]
    ids = torch.zeros(3, 24, dtype=torch.long)
    mask = torch.zeros(3, 24, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    base = random_rollout(3, time=24)
    problems = tuple(Problem(index=i, messages=[{"role": "user", "content": "?"}]) for i in range(3))
    prompt = PromptBatch(ids=base.prompt.ids, mask=base.prompt.mask, problems=problems, seeds=(0, 1, 2))
    return Rollout(
        prompt=prompt,
        ids=ids,
        mask=mask,
        origin=base.origin,
        horizon=base.horizon,
        behavior_logp=base.behavior_logp,
        finish=torch.full((3,), int(Finish.EOS)),
        group=base.group,
    )


def test_repetition_reaches_both_metrics(rollout):
    tokenizer = load_tokenizer("builtin:word_problems/student", "student.path")
    graded = grade(WordProblems(), tokenizer, rollout.prompt, rollout.ids, rollout.mask, rollout.finish)
    assert graded.repetition.tolist() == [0.5, 0.0, 0.0]
    report = describe(graded, Experience(rollout=rollout, share=torch.zeros(3, 24)), None)
    means = report.means(lambda t: t, torch.device("cpu"))
    assert means["rollout/repetition"] == pytest.approx(1 / 6)
    metrics = ResponseMetrics()
    metrics.update(graded.rows([0]))
    metrics.update(graded.rows([1, 2]))
    assert float(metrics.compute()["repetition"]) == pytest.approx(1 / 6)
