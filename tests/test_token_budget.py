"""Micro-batches and scoring passes within a budget of tokens: never over it, and nothing else changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from test_collector import ROLLOUT, collect, collector, joined, student, teacher  # noqa: F401 (fixtures)
from test_split_invariance import ESTIMATORS, gradient
from test_trainer import Toy, Watch
from tiny import random_experience

from opd_lightning.buffer import micro_batch_count, micro_batches
from opd_lightning.data import OnPolicyData
from opd_lightning.errors import ConfigError
from opd_lightning.layout import Rows
from opd_lightning.objective import Objective
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.schedule import Linear
from opd_lightning.scoring import _fitting
from opd_lightning.sizes import longest_row
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Experience
from opd_lightning.world import World


def with_lengths(experience: Experience, lengths: list[int]) -> Experience:
    """Return the experience with prompts of one token and responses so long that rows have these lengths."""
    rollout, time = experience.rollout, experience.rollout.ids.shape[1]
    shown = torch.zeros_like(rollout.prompt.mask)
    shown[:, -1] = True
    mask = torch.arange(time) < torch.tensor(lengths).unsqueeze(-1) - 1
    return replace(
        experience, rollout=replace(rollout, prompt=replace(rollout.prompt, mask=shown), mask=mask)
    )


def sizes(parts: list[Experience]) -> list[int]:
    """Return the tokens of each micro-batch with its padding."""
    found = []
    for part in parts:
        lengths = part.rollout.prompt.mask.sum(-1) + part.rollout.lengths
        found.append(len(lengths) * int(lengths.max()))
    return found


def test_counts_of_known_budgets():
    # 16 rows of at most 100 tokens: 250 hold two of them, 199 and 100 one, 1,600 all.
    assert [micro_batch_count(16, 100, budget) for budget in (100, 199, 250, 1599, 1600)] == [16, 16, 8, 2, 1]
    assert micro_batch_count(7, 10, 30) == 3


def test_no_micro_batch_is_over_its_budget():
    """Whatever the lengths; the cut by tokens alone is over in some of these."""
    draw, experience = random.Random(0), random_experience(24, time=99)
    for _ in range(300):
        longest, rows = draw.choice([10, 50, 100]), draw.randint(1, 24)
        low = draw.randint(2, longest)
        lengths = [draw.randint(low, longest) for _ in range(rows)]
        budget = draw.randint(1, 6) * longest + draw.randint(0, longest - 1)
        count = micro_batch_count(rows, longest, budget)
        parts = micro_batches(with_lengths(experience.rows(slice(0, rows)), lengths), count)
        assert len(parts) == count
        assert max(sizes(parts)) <= budget


def test_the_cut_by_tokens_is_kept_where_it_is_smaller():
    experience = with_lengths(random_experience(4, time=99), [10, 10, 10, 100])
    assert sizes(micro_batches(experience, 2)) == [30, 100]  # two rows in each would be 20 and 200


@pytest.mark.parametrize("budget", [16, 40, 90, 10**6])
def test_a_budget_changes_no_loss(budget):
    objective = Objective(estimator=ESTIMATORS["topk tail"], support=TeacherTopK(k=4), reduction=TokenMean())
    experience = objective.finish(random_experience(11), World())
    expected, reference = gradient(objective, [experience])
    parts = micro_batches(experience, micro_batch_count(11, 16, budget))
    loss, found = gradient(objective, parts)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (found - reference).abs().max() <= 1e-6 * reference.abs().max()


# -- scoring


def test_scoring_passes_of_known_sizes():
    # Rows times longest within 12: 2 + 2 + 3 make 9, with the 4 it would be 16; two 6 make 12; 20 goes alone.
    assert _fitting([2, 2, 3, 4, 6, 6, 20], 12) == [3, 2, 1, 1]
    assert _fitting([1, 1, 1], 1) == [1, 1, 1]


def test_scores_do_not_depend_on_the_budget(student, teacher):  # noqa: F811 (fixtures)
    seen = []

    def watch(module, args) -> None:
        seen.append(args[0])

    one = joined(collect(collector(teacher), student)[0])
    hook = teacher.scorer.register_forward_pre_hook(watch)
    other = joined(collect(collector(teacher, score_rows=1, score_tokens=400), student)[0])
    hook.remove()
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key][0], other[key][0])
        torch.testing.assert_close(one[key][1], other[key][1], atol=2e-5, rtol=1e-5)
    computed = [len(r.lengths) * (int(r.lengths.max()) + 1) for r in map(Rows.of, seen)]
    assert max(computed) <= 400
    assert sum(computed[i] + computed[i + 1] <= 400 for i in range(len(computed) - 1)) == 0


# -- the run


def test_the_trainer_accumulates_as_the_budget_asks():
    """Four prompts of two samples a step; a row has at most 512 + 8 tokens: three of eight rows fit."""
    plain = Toy(prompts=4, new=8, dtype=torch.float64)
    before = plain.weights()
    plain.fit(3)
    toy, watch = Toy(prompts=4, new=8, dtype=torch.float64), Watch()
    settings = replace(toy.data.collector, micro_batch_tokens=3 * 520)
    toy.data = OnPolicyData(settings, toy.data.validation, toy.data.evaluation)
    trainer = toy.fit(3, watch, val_check_interval=2, check_val_every_n_epoch=None)
    assert trainer.accumulate_grad_batches == 3
    assert trainer.val_check_interval == 6  # still every second optimizer step
    assert trainer.global_step == 3
    assert len(watch.batches) == 9
    assert (plain.weights() - before).norm() > 1e-3
    assert (toy.weights() - plain.weights()).norm() <= 1e-12 * plain.weights().norm()
    trainer.fit(toy.module, datamodule=toy.data)  # is set up again
    assert (trainer.accumulate_grad_batches, trainer.val_check_interval) == (3, 6)


def test_processes_share_the_rows(teacher):  # noqa: F811 (fixture)
    settings = collector(teacher, micro_batch_tokens=524)
    assert [settings.micro_batches(size) for size in (1, 2, 4)] == [8, 4, 2]
    assert collector(teacher).micro_batches(1) is None


def test_a_schedule_is_as_long_as_it_becomes():
    assert longest_row(ROLLOUT, 100) == 112
    for start, end in ((5, 40), (40, 5)):
        growing = replace(ROLLOUT, max_new_tokens=Linear(start=start, end=end))
        assert longest_row(growing, 100) == 140


def test_a_rollout_of_unknown_length_is_refused():
    with pytest.raises(ConfigError, match=r"micro_batch_tokens.*null.*object.*accumulate_grad_batches"):
        longest_row(object(), 100)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [99, 0, 200.0, True])
def test_a_budget_below_one_row_is_refused(budget):
    with pytest.raises(ConfigError, match=r"collector\.micro_batch_tokens.*100 tokens.*use at least 100"):
        micro_batch_count(16, 100, budget)


def test_both_a_budget_and_a_count_are_refused():
    toy = Toy()
    settings = replace(toy.data.collector, micro_batch_tokens=1000)
    toy.data = OnPolicyData(settings, toy.data.validation, toy.data.evaluation)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches.*got 3.*leave one of the two out"):
        toy.fit(1, accumulate=3)
