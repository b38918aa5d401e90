"""The masks that choose tokens: by position, by score, by quantile; numerics.md section 11, point 27."""

import math
from dataclasses import replace

import pytest
import torch
from tabular import make_rollout

from opd_lightning.errors import ConfigError
from opd_lightning.functional.divergence import forward_kl, reverse_kl
from opd_lightning.mask.entropy_quantile import EntropyQuantile
from opd_lightning.mask.first import First
from opd_lightning.mask.last import Last
from opd_lightning.mask.middle import Middle
from opd_lightning.mask.random import Random
from opd_lightning.mask.reward_floor import RewardFloor
from opd_lightning.mask.stop_token import StopToken
from opd_lightning.mask.tip import Tip
from opd_lightning.mask.top import TopPositions
from opd_lightning.mask.trajectory_floor import TrajectoryFloor
from opd_lightning.mask.two_phases import TwoPhases
from opd_lightning.schedule import Cosine, Linear, Step
from opd_lightning.types import Experience, Finish, FullTerm
from opd_lightning.world import World

RKL, FKL = FullTerm("teacher", reverse_kl), FullTerm("teacher", forward_kl)
# Six responses of 1, 2, ... 6 tokens.
LENGTHS = torch.arange(1, 7)
RAGGED = torch.arange(6) < LENGTHS.unsqueeze(-1)


def experience(mask=RAGGED, *, progress=0.0, finish=None, **collected):
    rollout = make_rollout(torch.full(mask.shape, 7), mask)
    if finish is not None:
        rollout = replace(rollout, finish=finish)
    return Experience(rollout=rollout, share=torch.zeros(mask.shape), progress=progress, **collected)


def kept(part, seen, inside=None, world=World()):
    """Rows of 0 and 1."""
    inside = seen.rollout.mask if inside is None else inside
    stays = part(seen, inside, world)
    assert not (stays & ~inside).any()
    return stays.int().tolist()


def line(*values):
    return torch.tensor([values], dtype=torch.float32)


def one_row(*, progress=0.0, **collected):
    (length,) = {values.shape[-1] for values in collected.values() if not isinstance(values, dict)} or {4}
    return experience(torch.ones(1, length, dtype=torch.bool), progress=progress, **collected)


class TestByPosition:
    def test_by_hand(self):
        seen = experience()
        assert kept(First(count=2), seen)[5] == [1, 1, 0, 0, 0, 0]
        assert kept(Last(count=2), seen)[5] == [0, 0, 0, 0, 1, 1]
        assert kept(Last(count=2), seen)[2] == [0, 1, 1, 0, 0, 0]
        assert kept(Middle(count=2), seen)[5] == [0, 0, 1, 1, 0, 0]
        assert kept(Middle(count=2), seen)[4] == [0, 1, 1, 0, 0, 0]  # (5 - 2) // 2 = 1 before
        assert kept(Middle(count=3), seen)[4] == [0, 1, 1, 1, 0, 0]

    @pytest.mark.parametrize("kind", [First, Last, Middle, Random])
    @pytest.mark.parametrize("count", [1, 3, 6, 100, math.inf])
    def test_as_many_as_asked_or_all(self, kind, count):
        stays = kind(count=count)(experience(), RAGGED, World())
        assert stays.sum(-1).tolist() == [min(n, count) for n in range(1, 7)]
        assert not (stays & ~RAGGED).any()

    def test_they_look_at_what_is_still_in_the_loss(self):
        mask, inside = torch.ones(1, 6, dtype=torch.bool), torch.tensor([[0, 1, 1, 0, 1, 0]]).bool()
        seen = experience(mask)
        assert kept(First(count=2), seen, inside) == [[0, 1, 1, 0, 0, 0]]
        assert kept(Last(count=2), seen, inside) == [[0, 0, 1, 0, 1, 0]]
        assert kept(Middle(count=1), seen, inside) == [[0, 0, 1, 0, 0, 0]]
        assert sum(kept(Random(count=2), seen, inside)[0]) == 2

    def test_a_draw_belongs_to_its_response(self):
        """Not to its neighbours, its place in the batch, or the padding behind it."""
        mask = torch.ones(8, 6, dtype=torch.bool)
        seen, part = experience(mask), Random(count=3)
        rows = kept(part, seen)
        assert len({tuple(row) for row in rows}) > 4
        turned = [5, 2, 7]
        assert kept(part, seen.rows(turned)) == [rows[i] for i in turned]
        wide = make_rollout(torch.zeros(8, 20, dtype=torch.long), torch.arange(20).expand(8, 20) < 6)
        assert [row[:6] for row in kept(part, Experience(rollout=wide, share=torch.zeros(8, 20)))] == rows

    def test_every_token_is_as_likely(self):
        mask = torch.ones(2000, 5, dtype=torch.bool)
        share = Random(count=2)(experience(mask), mask, World()).float().mean(0)
        # four standard errors of sqrt(.4 * .6 / 2000)
        assert (share - 0.4).abs().max() < 0.044


class TestSchedules:
    """Point 27."""

    # numerics 11.27
    def test_a_cosine_horizon(self):
        """From 1 to 0 it is .5 in the middle; here from 9 to 1, so 5."""
        mask = torch.ones(1, 12, dtype=torch.bool)
        part = First(count=Cosine(start=9, end=1))
        at = {p: sum(kept(part, experience(mask, progress=p))[0]) for p in (0.0, 0.5, 1.0)}
        assert at == {0.0: 9, 0.5: 5, 1.0: 1}

    def test_a_growing_horizon_rounds_and_keeps_a_token(self):
        mask = torch.ones(1, 12, dtype=torch.bool)
        part = Last(count=Linear(start=1, end=11))
        counts = [sum(kept(part, experience(mask, progress=p / 20))[0]) for p in (0, 1, 10, 20)]
        assert counts == [1, 2, 6, 11]  # 1.5 rounds to 2

    # numerics 11.27
    @pytest.mark.parametrize("of", [3, 7, 150, 320])
    def test_a_switch_falls_on_its_step(self, of):
        """Progress is steps done over planned steps: step k of n sees the second phase if k / n >= switch."""
        at = of // 3
        seen = one_row(
            teacher_taken_logp=line(-9.0, -1.0, -1.0, -1.0),
            collected_logp=line(-1.0, -1.0, -1.0, -1.0),
            collected_entropy=line(4.0, 1.0, 2.0, 3.0),
        )
        gate = TwoPhases(floor=-2.0, share=0.25, switch=at / of)
        count = First(count=Step(before=1, after=3, at=at / of))
        for step, (phase, tokens) in {at - 1: ([0, 1, 1, 1], 1), at: ([1, 0, 0, 0], 3)}.items():
            now = replace(seen, progress=step / of)
            assert kept(gate, now) == [phase]
            assert sum(kept(count, now)[0]) == tokens

    def test_shares_and_floors_may_move(self):
        seen = one_row(
            teacher_taken_logp=line(-4.0, -3.0, -2.0, -1.0),
            collected_logp=line(0.0, 0.0, 0.0, 0.0),
            collected_entropy=line(1.0, 2.0, 3.0, 4.0),
            progress=0.5,
        )
        assert kept(EntropyQuantile(share=Linear(start=1.0, end=0.0)), seen) == [[0, 0, 1, 1]]
        assert kept(RewardFloor(floor=Linear(start=-5.0, end=0.0)), seen) == [[0, 0, 1, 1]]


class TestByScore:
    @pytest.mark.parametrize(
        ("score", "best"),
        [
            ("reverse_kl", 0),
            ("forward_kl", 1),
            ("student_entropy", 2),
            ("teacher_entropy", 3),
            ("entropy_product", 4),
            ("kl_entropy", 5),
            ("kl_entropies", 6),
        ],
    )
    def test_each_score_has_its_own_best_token(self, score, best):
        """Columns are tokens. Products: H_S H_T 25 at 4; RKL H_S 35 at 5; RKL H_S H_T 64 at 6."""
        reverse = line(9.0, 0.0, 0.0, 0.0, 0.0, 7.0, 4.0)
        student = line(0.0, 0.0, 8.0, 0.0, 5.0, 5.0, 4.0)
        teacher = line(0.0, 0.0, 0.0, 8.0, 5.0, 1.0, 4.0)
        forward = line(0.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0)
        part = TopPositions(score=score, count=1)
        seen = experience(
            torch.ones(1, 7, dtype=torch.bool),
            collected_entropy=student if part.needs.collected_entropy else None,
            teacher_entropy=teacher if part.needs.teacher_entropy else None,
            collected_full={
                t: v for t, v in ((RKL, reverse), (FKL, forward)) if t in part.needs.collected_full
            },
        )
        assert kept(part, seen) == [[int(t == best) for t in range(7)]]

    def test_short_responses_stay_whole_and_ties_go_by_position(self):
        seen = experience(collected_entropy=torch.ones(RAGGED.shape))
        part = TopPositions(score="student_entropy", count=3)
        assert kept(part, seen) == kept(First(count=3), seen)

    def test_only_tokens_in_the_loss_compete(self):
        seen = one_row(collected_entropy=line(9.0, 1.0, 3.0, 2.0))
        inside = torch.tensor([[0, 1, 1, 1]]).bool()
        assert kept(TopPositions(score="student_entropy", count=2), seen, inside) == [[0, 0, 1, 1]]


class TestByShare:
    def test_entropy_over_the_whole_step(self):
        """20 % of 10 tokens are the 2 least certain ones, both in one response; padding holds more."""
        entropy = torch.tensor([[5.0, 4.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0, 1.0], [9.0] * 5])
        mask = torch.tensor([[1] * 5, [1] * 5, [0] * 5], dtype=torch.bool)
        got = kept(EntropyQuantile(share=0.2), experience(mask, collected_entropy=entropy))
        assert got == [[1, 1, 0, 0, 0], [0] * 5, [0] * 5]

    def test_tip(self):
        """h = 0, .5, 1, 0, 0 and d = 0, .5, 0, .8, 1: scores 0, .75, 1, .8, 1, where h + d has 1 at token 1."""
        seen = experience(
            torch.ones(1, 5, dtype=torch.bool),
            collected_entropy=line(1.0, 2.0, 3.0, 1.0, 1.0),
            collected_full={RKL: line(0.5, 3.0, 0.5, 4.5, 5.5)},
        )
        assert kept(Tip(share=0.4), seen) == [[0, 0, 1, 0, 1]]
        assert kept(Tip(share=0.6), seen) == [[0, 0, 1, 1, 1]]
        assert kept(Tip(share=0.8), seen) == [[0, 1, 1, 1, 1]]

    def test_responses_that_the_teacher_finds_unlikely(self):
        """Means -1, -2, ... over responses of 1, 2, ... tokens; sums and padding would order them otherwise."""
        means = torch.tensor([-3.0, -1.0, -2.0, -5.0, -0.5, -0.1])
        teacher = means.unsqueeze(-1).expand(6, 6).masked_fill(~RAGGED, -100.0)
        seen = experience(teacher_taken_logp=teacher)
        got = kept(TrajectoryFloor(share=0.4), seen)  # floor(.4 * 6) = 2 of them leave
        assert [any(row) for row in got] == [False, True, True, False, True, True]
        assert got[5] == [1] * 6
        assert kept(TrajectoryFloor(share=0.0), seen) == RAGGED.int().tolist()
        # without the last two responses, one of the four others leaves
        inside = RAGGED & (torch.arange(6) < 4).unsqueeze(-1)
        got = kept(TrajectoryFloor(share=0.25), seen, inside)
        assert [any(row) for row in got] == [True, True, True, False, False, False]

    @pytest.mark.parametrize(
        "part", [EntropyQuantile(share=0.3), Tip(share=0.5), TrajectoryFloor(share=0.4)], ids=repr
    )
    def test_two_ranks_keep_what_one_would(self, part):
        draw = torch.Generator().manual_seed(3)
        values = [torch.rand(6, 6, generator=draw) * LENGTHS.unsqueeze(-1) for _ in range(3)]
        whole = experience(
            torch.ones(6, 6, dtype=torch.bool),
            collected_entropy=values[0],
            collected_full={RKL: values[1]},
            teacher_taken_logp=-values[2],
        )
        alone = kept(part, whole)
        halves = [whole.rows(slice(0, 2)), whole.rows(slice(2, 6))]
        assert on_two_ranks(part, halves) == alone
        assert [row for half in halves for row in kept(part, half)] != alone


def on_two_ranks(part, halves):
    """Run each half with the other's numbers in every call of gather, found call by call."""
    known = []
    while True:
        rows, calls = [], []
        for half in halves:
            asked, replies = [], iter(known)
            world = World(size=2, gather=lambda own, a=asked, r=replies: a.append(own) or next(r, own))
            rows += kept(part, half, world=world)
            calls.append(asked)
        if len(known) == len(calls[0]) == len(calls[1]):
            return rows
        known.append(torch.cat([asked[len(known)] for asked in calls]))


class TestByReward:
    SEEN = one_row(
        teacher_taken_logp=line(-3.0, -1.0, -2.72, -2.8), collected_logp=line(-1.0, -2.0, -1.0, -1.0)
    )

    def test_floor(self):
        # r = -2, 1, -1.72, -1.8
        assert kept(RewardFloor(floor=-1.75), self.SEEN) == [[0, 1, 1, 0]]
        assert kept(RewardFloor(floor=-2.0), self.SEEN) == [[1, 1, 1, 1]]
        assert kept(RewardFloor(floor=-math.inf), self.SEEN) == [[1, 1, 1, 1]]

    def test_phases_are_the_two_masks(self):
        seen = replace(self.SEEN, collected_entropy=line(4.0, 1.0, 2.0, 3.0))
        part = TwoPhases(floor=-1.75, share=0.5, switch=0.5)
        assert (
            kept(part, replace(seen, progress=0.2)) == kept(RewardFloor(floor=-1.75), seen) == [[0, 1, 1, 0]]
        )
        assert (
            kept(part, replace(seen, progress=0.7))
            == kept(EntropyQuantile(share=0.5), seen)
            == [[1, 0, 0, 1]]
        )
        assert part.needs == RewardFloor.needs | EntropyQuantile.needs


def test_the_decision_to_stop():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    finish = torch.tensor([Finish.EOS, Finish.LENGTH, Finish.HORIZON, Finish.EOS])
    got = kept(StopToken(), experience(mask, finish=finish))
    assert got == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: First(count=0), r"`mask.first.count` must be at least 1 token, got 0"),
        (lambda: Last(count=0.5), r"`mask.last.count` must be at least 1 token, got 0.5"),
        (lambda: Middle(count=Linear(start=4, end=0)), r"`mask.middle.count` must be at least 1 token"),
        (lambda: Random(count=-1), r"`mask.random.count` must"),
        (
            lambda: TopPositions(score="kl", count=3),
            r"`mask.top.score` must be one of reverse_kl, .* got 'kl'",
        ),
        (lambda: TopPositions(score="reverse_kl", count=0), r"`mask.top_reverse_kl.count` must"),
        (lambda: EntropyQuantile(share=1.5), r"`mask.entropy_quantile.share` must be in \[0, 1\], got 1.5"),
        (lambda: Tip(share=-0.5), r"`mask.tip.share` must be in \[0, 1\]"),
        (lambda: TrajectoryFloor(share=2.0), r"`mask.trajectory_floor.share` must be in \[0, 1\]"),
        (lambda: RewardFloor(floor=0.5), r"`mask.reward_floor.floor` must be at most 0, got 0.5"),
        (lambda: TwoPhases(floor=-1, share=0.2, switch=2), r"`mask.two_phases.switch` must be in \[0, 1\]"),
        (lambda: TwoPhases(floor=1, share=0.2, switch=0.5), r"`mask.two_phases.floor` must"),
    ],
)
def test_refusals(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_what_was_not_collected_is_named():
    with pytest.raises(ValueError, match="collected_entropy was declared as needed"):
        EntropyQuantile(share=0.2)(experience(), RAGGED, World())
