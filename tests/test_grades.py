"""Graded responses: what is measured of their tokens, and where it goes."""

from dataclasses import replace

import pytest
import torch
from tiny import random_rollout

from opd_lightning.diagnostics.collection import describe
from opd_lightning.diagnostics.responses import ResponseMetrics
from opd_lightning.grades import grade
from opd_lightning.models import load_tokenizer
from opd_lightning.task.word_problems import WordProblems
from opd_lightning.types import Experience, Finish, Graded, Problem, PromptBatch, Rollout


def rollout_of(rows: list[list[int]]) -> Rollout:
    """One response a row, padded behind with equal ids."""
    most = max(map(len, rows))
    ids = torch.zeros(len(rows), most, dtype=torch.long)
    mask = torch.zeros(len(rows), most, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
    base, seeds = random_rollout(len(rows), time=most), range(len(rows))
    problems = tuple(Problem(index=i, messages=[{"role": "user", "content": "?"}]) for i in seeds)
    prompt = PromptBatch(ids=base.prompt.ids, mask=base.prompt.mask, problems=problems, seeds=tuple(seeds))
    finish = torch.full((len(rows),), int(Finish.EOS))
    return replace(base, prompt=prompt, ids=ids, mask=mask, finish=finish)


def both(rollout: Rollout) -> tuple[Graded, dict[str, float], dict[str, float]]:
    """Grade, and return what a collection's report and an evaluation, in two batches, make of it."""
    tokenizer = load_tokenizer("builtin:word_problems/student", "student.path")
    graded = grade(WordProblems(), tokenizer, rollout.prompt, rollout.ids, rollout.mask, rollout.finish)
    count = len(graded.texts)
    report = describe(graded, Experience(rollout=rollout, share=torch.zeros(rollout.ids.shape)), None)
    means = report.means(lambda t: t, torch.device("cpu"))
    metrics = ResponseMetrics()
    metrics.update(graded.rows([0]))
    metrics.update(graded.rows(list(range(1, count))))
    return graded, means, {name: float(value) for name, value in metrics.compute().items()}


def test_repetition_reaches_both_metrics():
    """Nine equal tokens (2 eight-grams, 1 of them new); twelve different ones; three; padding is all equal."""
    graded, collected, evaluated = both(rollout_of([[7] * 9, list(range(10, 22)), [7] * 3]))
    assert graded.repetition.tolist() == [0.5, 0.0, 0.0]
    assert collected["rollout/repetition"] == pytest.approx(1 / 6)
    assert evaluated["repetition"] == pytest.approx(1 / 6)


def test_responses_that_end_in_a_loop_reach_both_metrics():
    """10,000 characters of one byte are a loop, 9,999 are too short to be one."""
    graded, collected, evaluated = both(rollout_of([[20] * 10_000, [20] * 9_999, [7] * 3]))
    assert len(graded.texts[0]) == 10_000
    assert graded.repetitive.tolist() == [True, False, False]
    assert collected["rollout/repetitive"] == pytest.approx(1 / 3)
    assert evaluated["repetitive"] == pytest.approx(1 / 3)
