"""The collecting half: what reaches the learning half is what was generated and scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from tiny import tiny_model

from opd_lightning.buffer import micro_batches
from opd_lightning.collector import Collector, World
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.models import load_tokenizer
from opd_lightning.objective import Objective
from opd_lightning.prompts import Prompts
from opd_lightning.reduction.sequence_mean import SequenceMean
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.rollout.mixture import Mixture
from opd_lightning.rollout.prefix import TeacherPrefix
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.schedule import Linear
from opd_lightning.scorer import Scorer
from opd_lightning.support.augmented import Augmented
from opd_lightning.support.full import Full
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.support.union import Union
from opd_lightning.task.word_problems import WordProblems
from opd_lightning.teacher.local import FrozenScorer
from opd_lightning.types import Finish, Needs, Want

TOKENIZER = load_tokenizer("builtin:word_problems/student", "student.path")
TASK = WordProblems(min_steps=3, max_steps=6)
WIDTH = 448
ROLLOUT = StudentRollout(
    samples=2,
    max_new_tokens=12,
    loss_horizon=None,
    early_stop=False,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
)


@pytest.fixture(scope="module")
def student() -> Scorer:
    return Scorer(tiny_model(1, vocab=WIDTH)).eval()


@pytest.fixture(scope="module")
def teacher() -> FrozenScorer:
    return FrozenScorer(Scorer(tiny_model(2, vocab=WIDTH)).eval().requires_grad_(False))


def collector(teacher, **changes) -> Collector:
    settings = {
        "task": TASK,
        "prompts": Prompts(
            problems=TASK.problems("train"), tokenizer=TOKENIZER, max_tokens=512, long="drop", seed=0
        ),
        "engine": TransformersEngine(batch_size=64, method="auto"),
        "rollout": ROLLOUT,
        "teacher": teacher,
        "objective": Objective(
            estimator=TopK(divergence=ReverseKL(), form="renormalised"),
            support=TeacherTopK(k=4),
            reduction=TokenMean(),
        ),
        "tokenizer": TOKENIZER,
        "stop_ids": tuple(range(0, WIDTH, 8)),  # about every eighth token: ragged responses
        "prompts_per_collection": 8,
        "steps_per_collection": 2,
        "score_rows": 5,
        "probe_rows": 3,
    }
    return Collector(**settings | changes)


def collect(collector: Collector, student: Scorer, number: int = 0, world: World | None = None, **more):
    """Return the optimizer steps of a collection, each cut into ``accumulate`` micro-batches, and its report."""
    settings = {"progress": 0.0, "version": 0, "accumulate": 1} | more
    accumulate = settings.pop("accumulate")
    steps, report = collector.collect(student, number, world=world or World(), **settings)
    return [micro_batches(step, accumulate) for step in steps], report


def joined(steps) -> dict[str, torch.Tensor]:
    """Return taken-token facts of all rows, keyed by prompt text and sample so that order is no matter."""
    rows = {}
    for step in steps:
        for part in step:
            for i, problem in enumerate(part.rollout.prompt.problems):
                key = (problem.index, part.rollout.prompt.seeds[i])
                length = int(part.rollout.mask[i].sum())
                rows[key] = (part.rollout.ids[i, :length], part.teacher_taken_logp[i, :length])
    return rows


def test_steps_and_micro_batches_hold_every_row_once(student, teacher):
    steps, _ = collect(collector(teacher), student, accumulate=3)
    assert [len(step) for step in steps] == [3, 3]
    assert sum(len(part.share) for step in steps for part in step) == 8 * 2
    rows = joined(steps)
    assert len(rows) == 16  # two samples of a prompt have seeds, and so tokens, of their own
    assert len({tuple(ids.tolist()) for ids, _ in rows.values()}) == 16
    for step in steps:
        assert sum(float(part.share.sum()) for part in step) == pytest.approx(1.0, abs=1e-6)
        assert len({part.rollout.version for part in step}) == 1


@pytest.mark.parametrize(
    "support",
    [TeacherTopK(k=4), StudentTopK(k=4), Augmented(k=4), Union(k=4)],
    ids=lambda s: type(s).__name__,
)
def test_the_support_carries_the_teacher_s_log_probs(student, teacher, support):
    objective = Objective(
        estimator=TopK(divergence=ReverseKL(), form="tail"), support=support, reduction=TokenMean()
    )
    steps, _ = collect(collector(teacher, objective=objective), student)
    assert any(not part.rollout.mask.all() for (part,) in steps)
    for (part,) in steps:
        ids, valid, mask = part.support_ids, part.support_valid, part.rollout.mask
        own = student(part.rollout.tokens, Want(top=4))
        taught = teacher(part.rollout.tokens, Want(support="exact", top=4), ids)
        torch.testing.assert_close(
            part.support_teacher_logp[valid], taught.support_logp[valid], atol=2e-5, rtol=1e-5
        )
        assert not (valid & ~mask.unsqueeze(-1)).any()
        for row, time in mask.nonzero().tolist():
            found = set(ids[row, time][valid[row, time]].tolist())
            assert len(found) == int(valid[row, time].sum())  # no id twice
            expected = set()
            if not isinstance(support, StudentTopK):
                expected |= set(taught.top_ids[row, time].tolist())
            if isinstance(support, StudentTopK | Union):
                expected |= set(own.top_ids[row, time].tolist())
            if isinstance(support, Augmented):
                expected.add(int(part.rollout.ids[row, time]))
            assert found == expected


# numerics 11.29
def test_teacher_scores_belong_to_their_tokens(student, teacher):
    (first, *_), _ = collect(collector(teacher), student)
    (part,) = first
    expected = teacher(part.rollout.tokens, Want(taken=True, entropy=True))
    torch.testing.assert_close(part.teacher_taken_logp, expected.taken_logp, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(part.teacher_entropy, expected.entropy, atol=2e-5, rtol=1e-5)


def test_a_full_support_carries_hidden_states_and_no_ids(student, teacher):
    objective = Objective(
        estimator=TopK(divergence=ReverseKL(), form="renormalised"), support=Full(), reduction=TokenMean()
    )
    steps, _ = collect(collector(teacher, objective=objective), student)
    (part,) = steps[0]
    assert part.support_ids is None
    assert part.teacher_hidden.shape[:2] == part.rollout.ids.shape
    assert objective.want.full
    assert objective.want.support == "none"


# numerics 11.23
def test_rows_do_not_depend_on_scoring_or_decoding_batches(student, teacher):
    one = joined(collect(collector(teacher), student)[0])
    engine = TransformersEngine(batch_size=3, method="auto")
    other = joined(collect(collector(teacher, engine=engine, score_rows=2), student)[0])
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key][0], other[key][0])
        torch.testing.assert_close(one[key][1], other[key][1], atol=2e-5, rtol=1e-5)


# numerics 11.23
def test_two_ranks_collect_what_one_process_collects(student, teacher):
    whole, _ = collect(collector(teacher), student)
    # Shares need both ranks' counts; rows do not, so that a lonely rank can be compared row by row.
    ranks = [collect(collector(teacher), student, world=World(rank, 2)) for rank in (0, 1)]
    for step in range(2):
        alone = joined([whole[step]])
        together = joined([ranks[0][0][step]]) | joined([ranks[1][0][step]])
        assert alone.keys() == together.keys()
        assert not joined([ranks[0][0][step]]).keys() & joined([ranks[1][0][step]]).keys()
        assert all(torch.equal(alone[k][0], together[k][0]) for k in alone)


def test_collections_differ_and_repeat(student, teacher):
    made = collector(teacher)
    zero, one = joined(collect(made, student, 0)[0]), joined(collect(made, student, 1)[0])
    assert not zero.keys() & one.keys()
    again = joined(collect(made, student, 0)[0])
    assert all(torch.equal(zero[k][0], again[k][0]) for k in zero)


def test_horizons_follow_their_schedules(student, teacher):
    rollout = replace(ROLLOUT, max_new_tokens=10, loss_horizon=Linear(start=2, end=8), early_stop=True)
    made = collector(teacher, rollout=rollout, stop_ids=(2,))  # hardly any ends by itself
    for progress, horizon in ((0.0, 2), (0.5, 5), (1.0, 8)):
        steps, _ = collect(made, student, progress=progress)
        for (part,) in steps:
            assert part.progress == progress
            inside = part.share > 0
            assert not inside[:, horizon:].any()
            assert torch.equal(inside[:, :horizon], part.rollout.mask[:, :horizon])
            assert not (part.rollout.finish == Finish.LENGTH).any()
            assert (part.rollout.finish == Finish.HORIZON).any()


def test_esr_equals_a_full_rollout_with_a_loss_mask(student, teacher):
    """numerics 11.20: the same draws, per-sequence mean over the supervised tokens."""
    objective = Objective(
        estimator=Token(reward=LogRatio()), support=TeacherTopK(k=4), reduction=SequenceMean()
    )
    short = replace(ROLLOUT, max_new_tokens=5, loss_horizon=5, early_stop=True)
    long = replace(ROLLOUT, max_new_tokens=12, loss_horizon=5)
    losses = []
    for rollout in (short, long):
        steps, _ = collect(collector(teacher, rollout=rollout, objective=objective), student)
        total = 0.0
        for (part,) in steps:
            scores = student(part.rollout.tokens, objective.want, part.support_ids)
            total += objective.loss(scores, part, 0.0)[0]
        losses.append(float(total.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_report_speaks_of_the_rollouts(student, teacher):
    steps, report = collect(collector(teacher), student)
    means = report.means(lambda t: t, torch.device("cpu"))
    lengths = [int(part.rollout.mask.sum()) for step in steps for part in step]
    assert means["rollout/length"] == pytest.approx(sum(lengths) / 16)
    assert 0 <= means["support/teacher_mass"] <= 1
    assert means["support/student_mass"] < means["support/teacher_mass"]
    assert means["student/entropy"] > 0
    assert means["rollout/accuracy"] == 0.0


def test_gold_rows_and_prefixes_are_not_the_student_s(student, teacher):
    """They are graded and scored beside its own, and no metric of the rollouts speaks of them."""
    gold = {"gold_samples": 1, "gold": "data", "gold_horizon": None, "teacher_temperature": 1.0}
    common = {
        "max_new_tokens": 12,
        "loss_horizon": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
    }
    alone, mixed = (
        collect(collector(teacher, rollout=rollout, probe_rows=8), student)[1].means(
            lambda t: t, torch.device("cpu")
        )
        for rollout in (
            StudentRollout(samples=1, early_stop=False, **common),
            Mixture(student_samples=1, **gold, **common),
        )
    )
    rows = {name for name in alone if name.startswith("rollout/")}
    assert len(rows) == 7
    assert {name: mixed[name] for name in rows} == pytest.approx({name: alone[name] for name in rows})
    assert {
        name: mixed[name] for name in ("teacher/logp", "teacher/entropy") if name in alone
    } == pytest.approx({name: alone[name] for name in ("teacher/logp", "teacher/entropy") if name in alone})


def test_text_of_others_alone_leaves_no_metric_of_the_student(student, teacher):
    settings = {"student_samples": 0, "gold_samples": 1, "gold": "data", "gold_horizon": None}
    settings |= {"max_new_tokens": 12, "loss_horizon": None, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    rollout = Mixture(**settings, min_p=0.0, teacher_temperature=1.0)
    built = collector(teacher, rollout=rollout)
    means = collect(built, student)[1].means(lambda t: t, torch.device("cpu"))
    assert not [name for name in means if name.startswith(("rollout/", "student/", "support/"))]
    assert built.clock.tokens["generate"] == 0  # the data's text is not generated


def test_tokens_are_counted_as_they_are_generated(student, teacher):
    """A teacher's response that three samples share is generated once."""
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    rollout = TeacherPrefix(samples=3, text="teacher", fraction=1.0, teacher_temperature=1.0, **settings)
    built = collector(teacher, rollout=rollout)
    steps, _ = collect(built, student)
    kept = sum(int(part.rollout.mask.sum()) for step in steps for part in step)
    assert kept == 3 * built.clock.tokens["generate"] > 0


def test_prompts_must_divide(teacher):
    with pytest.raises(ConfigError, match="prompts_per_collection"):
        collector(teacher, prompts_per_collection=7)
    with pytest.raises(ConfigError, match=r"multiple of 3 prompts.*use 12"):
        collector(teacher).check_world(3)


@dataclass(frozen=True)
class Elsewhere:
    """A support that chooses an id that nobody was asked about."""

    needs: ClassVar[Needs] = Needs(support=True, teacher_top=2)
    size: ClassVar[int] = 2

    def __call__(self, candidates):
        top = candidates.teacher_top
        other = next(i for i in range(WIDTH) if not ((top == i).any() or (candidates.taken == i).any()))
        return torch.full_like(top, other), torch.ones_like(top, dtype=torch.bool)


def test_a_support_that_leaves_its_candidates_is_refused(student, teacher):
    estimator = TopK(divergence=ReverseKL(), form="tail")
    objective = Objective(estimator=estimator, support=Elsewhere(), reduction=TokenMean())
    with pytest.raises(ConfigError, match="among its candidates"):
        collect(
            collector(teacher, objective=objective, prompts_per_collection=2, steps_per_collection=1), student
        )
