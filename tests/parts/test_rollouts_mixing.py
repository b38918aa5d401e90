"""Each rollout's own: prefixes, gold responses, coins, fixed texts, mixed samplers, horizons that grow."""

from collections import Counter

import pytest
import torch
from rollouts import STOPS, VOCAB, Pair, prompts_of, rollout_of, short, text

from opd_lightning.errors import ConfigError
from opd_lightning.rollout.coin import Coin
from opd_lightning.types import Finish, Origin, PromptBatch, Sampling


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


# -- prefix


def teacher_text(pair, prompts) -> list[list[int]]:
    """The teacher's responses that a prefix of the whole gives."""
    whole = pair.roll(short("teacher_prefix", fraction=1.0), prompts)
    return [text(whole, row) for row in range(len(prompts))]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_the_prefix_is_the_floor_of_the_share_of_this_response(fraction, pair):
    prompts = prompts_of()
    whole = teacher_text(pair, prompts)
    rollout = pair.roll(short("teacher_prefix", fraction=fraction, samples=3), prompts)
    for row in range(18):
        response = whole[row // 3]
        kept = int(fraction * len(response) + 1e-9)
        assert text(rollout, row)[:kept] == response[:kept]
        origin = rollout.origin[row][rollout.mask[row]].tolist()
        assert origin == [Origin.TEACHER] * kept + [Origin.STUDENT] * (len(origin) - kept)
    lengths = {len(response) for response in whole}
    assert len(lengths) > 2


def test_the_student_continues_what_the_prefix_makes_its_prompt(pair):
    """The tokens behind a prefix are what the student draws when prompt and prefix are its prompt."""
    prompts = prompts_of()
    part = short("teacher_prefix", fraction=0.5, samples=2)
    rollout = pair.roll(part, prompts)
    seen = 0
    for row in range(12):
        kept = int((rollout.origin[row] == Origin.TEACHER).sum())
        prompt = prompts.ids[row // 2][prompts.mask[row // 2]].tolist() + text(rollout, row)[:kept]
        asked = PromptBatch(
            ids=torch.tensor([prompt]),
            mask=torch.ones(1, len(prompt), dtype=torch.bool),
            problems=rollout.prompt.problems[row : row + 1],
            seeds=rollout.prompt.seeds[row : row + 1],
        )
        alone = pair.draw("student", asked, Sampling(max_new_tokens=12 - kept))
        assert text(alone, 0) == text(rollout, row)[kept:]
        assert int(alone.finish[0]) == int(rollout.finish[row])
        seen += len(text(alone, 0))
    assert seen > 20


def test_one_teacher_response_a_prompt_and_no_more_tokens_than_there_is_room_for(pair):
    pair.asked.clear()
    rollout = pair.roll(short("teacher_prefix", fraction=0.5, samples=4))
    (teacher, prompts, budget), (student, continued, room) = pair.asked
    assert (teacher, student, len(prompts), budget) == ("teacher", "student", 6, 12)
    assert len(continued) == 24
    shortest = int((rollout.origin == Origin.TEACHER).sum(-1).min())
    assert room == 12 - shortest
    assert rollout.mask.sum(-1).max() == 12
    assert not set(prompts.seeds) & set(continued.seeds)  # no random number serves both


def test_a_continuation_that_would_have_ended_past_the_budget_is_cut(pair):
    """Rows are continued together, with the room of the shortest prefix; a longer prefix leaves less."""
    pair.asked.clear()
    rollout = pair.roll(short("teacher_prefix", fraction=0.6, samples=8))
    _, (_, asked, room) = pair.asked
    whole = dict(
        zip(asked.seeds, pair.draw("student", asked, Sampling(max_new_tokens=room)).finish, strict=True)
    )
    late = [
        row
        for row, seed in enumerate(rollout.prompt.seeds)
        if seed in whole and int(whole[seed]) == Finish.EOS and text(rollout, row)[-1] not in STOPS
    ]
    assert late
    for row in late:
        assert len(text(rollout, row)) == 12
        assert int(rollout.finish[row]) == Finish.LENGTH


def test_the_prefix_is_in_the_loss_once_a_prompt(pair):
    rollout = pair.roll(short("teacher_prefix", fraction=0.5, samples=4))
    prefix = rollout.mask & (rollout.origin == Origin.TEACHER)
    first = torch.arange(24) % 4 == 0
    assert prefix.sum() > 0
    assert rollout.horizon[first].all()
    assert not (rollout.horizon & prefix)[~first].any()
    assert rollout.sampled.sum() == (rollout.mask & ~prefix).sum()
    assert rollout.written_by(frozenset({Origin.TEACHER})).sum() == prefix[first].sum()


def test_a_prefix_that_has_ended_is_not_continued(pair):
    pair.asked.clear()
    rollout = pair.roll(short("teacher_prefix", fraction=1.0, samples=2))
    # Those cut by the budget have no room either: nobody asks the student.
    assert [who for who, *_ in pair.asked] == ["teacher"]
    assert (rollout.origin[rollout.mask] == Origin.TEACHER).all()
    assert set(rollout.finish.tolist()) == {int(Finish.EOS), int(Finish.LENGTH)}


def test_a_gold_prefix_is_data_and_is_cut_at_the_budget(pair):
    rollout = pair.roll(short("teacher_prefix", text="data", fraction=1.0))
    gold = pair.gold(prompts_of())
    assert (gold.mask.sum(-1) > 12).any()
    for row in range(6):
        assert text(rollout, row) == text(gold, row)[:12]
        cut = int(gold.mask[row].sum()) > 12
        assert int(rollout.finish[row]) == (Finish.LENGTH if cut else Finish.EOS)
    assert (rollout.origin[rollout.mask] == Origin.DATA).all()
    assert (rollout.behavior_logp == 0).all()


def test_the_prefix_falls_over_the_run_along_the_papers_cosine(pair):
    prompts, whole = prompts_of(), teacher_text(pair, prompts_of())
    for progress, share in ((0.0, 1.0), (0.25, 0.854), (0.5, 0.5), (0.75, 0.146), (1.0, 0.0)):
        rollout = pair.roll(short("teacher_prefix"), prompts, progress)
        kept = (rollout.origin == Origin.TEACHER).sum(-1).tolist()
        assert kept == [int(share * len(response) + 1e-9) for response in whole]


# -- mixture


def test_a_mixture_holds_the_students_rows_and_then_the_gold_one(pair):
    prompts = prompts_of()
    rollout = pair.roll(short("mixture"), prompts)
    gold, alone = pair.gold(prompts), pair.roll(short("top_p", samples=3), prompts)
    for row in range(24):
        place, prompt = row % 4, row // 4
        if place < 3:
            assert text(rollout, row) == text(alone, 3 * prompt + place)
        else:
            assert text(rollout, row) == text(gold, prompt)[:12]
        want = Origin.STUDENT if place < 3 else Origin.DATA
        assert (rollout.origin[row][rollout.mask[row]] == want).all()


def test_gold_of_the_teacher_and_two_horizons(pair):
    part = short("mixture", student_samples=1, gold_samples=2, gold="teacher", loss_horizon=3, gold_horizon=5)
    rollout = pair.roll(part)
    assert rollout.sampled.sum(-1).max() == 3
    theirs = rollout.written_by(frozenset({Origin.TEACHER}))
    assert theirs.sum(-1).max() == 5
    assert theirs.any(-1).tolist() == [False, True, True] * 6
    assert text(rollout, 1) != text(rollout, 2)


@pytest.mark.parametrize(("who", "origin"), [("data", Origin.DATA), ("teacher", Origin.TEACHER)])
def test_a_mixture_without_the_student(who, origin, pair):
    pair.asked.clear()
    part = short("mixture", student_samples=0, gold=who)
    rollout = pair.roll(part)
    assert (rollout.origin[rollout.mask] == origin).all()
    assert {name for name, *_ in pair.asked} == part.writers == {"gold" if who == "data" else "teacher"}


def test_a_mixture_of_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"`rollout\.student_samples` must leave somebody who writes"):
        rollout_of("mixture", student_samples=0, gold_samples=0)


# -- coin


@pytest.mark.parametrize(("on_policy", "want"), [(0.0, Origin.DATA), (1.0, Origin.STUDENT)])
def test_the_ends_of_the_coin(on_policy, want, pair):
    rollout = pair.roll(short("coin", on_policy=on_policy, samples=3))
    assert (rollout.origin[rollout.mask] == want).all()


def test_the_coin_falls_as_often_as_it_should_and_a_row_has_one_writer(pair):
    prompts = prompts_of(400)
    rollout = pair.roll(short("coin", on_policy=0.3, max_new_tokens=2, text="teacher"), prompts)
    firsts = rollout.origin[:, 0]
    counts = Counter(firsts.tolist())
    assert set(counts) == {int(Origin.STUDENT), int(Origin.TEACHER)}
    assert abs(counts[Origin.STUDENT] - 120) < 4 * (400 * 0.3 * 0.7) ** 0.5
    assert (rollout.origin == firsts[:, None])[rollout.mask].all()
    more = pair.roll(short("coin", on_policy=0.6, max_new_tokens=2, text="teacher"), prompts)
    # The coin's number stays: a larger chance keeps the student's rows and adds others.
    assert (more.origin[:, 0] == Origin.STUDENT)[firsts == Origin.STUDENT].all()


def test_the_student_writes_what_it_would_alone_and_the_coin_may_be_a_schedule(pair):
    part = short("coin", on_policy="{_target_: opd_lightning.schedule.Linear, start: 0.0, end: 1.0}")
    assert isinstance(part, Coin)
    prompts, alone = prompts_of(), pair.roll(short("top_p"))
    for progress, rows in ((0.0, 0), (1.0, 6)):
        rollout = pair.roll(part, prompts, progress)
        own = [row for row in range(6) if int(rollout.origin[row, 0]) == Origin.STUDENT]
        assert len(own) == rows
        assert [text(rollout, row) for row in own] == [text(alone, row) for row in own]


# -- teacher's text


def test_fixed_text_is_written_once_a_problem_and_kept(pair):
    part, prompts = short("teacher_text", fixed="true", samples=2), prompts_of()
    pair.asked.clear()
    first = pair.roll(part, prompts.rows([0, 1, 2]))
    other_seeds = PromptBatch(
        ids=prompts.ids, mask=prompts.mask, problems=prompts.problems, seeds=tuple(range(6))
    )
    again = pair.roll(part, other_seeds)
    assert [len(asked) for _, asked, _ in pair.asked] == [6, 6]  # three problems, then the three new ones
    pair.roll(part, prompts.rows([5, 0, 3]))
    assert len(pair.asked) == 2
    assert [text(again, row) for row in range(6)] == [text(first, row) for row in range(6)]
    assert torch.allclose(again.behavior_logp[0, :2], first.behavior_logp[0, :2])
    fresh = pair.roll(short("teacher_text", fixed="true", samples=2), prompts)
    for field in ("ids", "mask", "finish"):  # memory is a cache: losing it changes nothing
        assert torch.equal(getattr(fresh, field), getattr(again, field))
    assert text(again, 0) != text(again, 1)


def test_fresh_text_follows_the_prompts_seeds(pair):
    prompts = prompts_of()
    again = PromptBatch(ids=prompts.ids, mask=prompts.mask, problems=prompts.problems, seeds=tuple(range(6)))
    first, second = pair.roll(short("teacher_text"), prompts), pair.roll(short("teacher_text"), again)
    assert [text(first, r) for r in range(6)] != [text(second, r) for r in range(6)]
    assert (first.origin[first.mask] == Origin.TEACHER).all()


def test_a_greedy_teacher_is_allowed_beside_a_student_that_samples(pair):
    prompts = prompts_of()
    for part in (
        short("teacher_text", temperature=0),
        short("coin", on_policy=0, text="teacher", teacher_temperature=0),
    ):
        rollout = pair.roll(part, prompts)
        greedy = pair.draw("teacher", prompts, Sampling(max_new_tokens=12, temperature=0))
        assert [text(rollout, row) for row in range(6)] == [text(greedy, row) for row in range(6)]


# -- mixed samplers


@pytest.mark.parametrize(
    ("name", "field", "low", "high"), [("linear_mix", "alpha", 0, 1), ("geometric", "epsilon", 0, 1e9)]
)
def test_the_ends_of_a_mixed_sampler_are_its_models(name, field, low, high, pair):
    prompts = prompts_of()
    own, theirs = pair.roll(short("top_p"), prompts), pair.roll(short("teacher_text"), prompts)
    for value, want in ((low, own), (high, theirs)):
        rollout = pair.roll(short(name, **{field: value}), prompts)
        assert torch.equal(rollout.ids, want.ids)
        assert torch.allclose(rollout.behavior_logp, want.behavior_logp, atol=1e-4)
        assert (rollout.origin == Origin.STUDENT).all()


def test_epsilon_falls_to_the_student_in_the_first_part_of_the_run(pair):
    own = pair.roll(short("top_p"))
    for progress, same in ((0.0, False), (0.25, True), (1.0, True)):
        assert torch.equal(pair.roll(short("geometric"), progress=progress).ids, own.ids) == same


# -- horizons


@pytest.mark.parametrize(("progress", "horizon"), [(0.0, 1), (0.5, 6), (1.0, 12)])
def test_the_progressive_horizon_grows_to_the_cap_that_stays(progress, horizon, pair):
    rollout = pair.roll(short("esr_progressive"), progress=progress)
    assert rollout.mask.sum(-1).max() == 12
    assert rollout.sampled.sum(-1).max() == horizon
    assert Finish.HORIZON not in rollout.finish.tolist()


def test_both_horizons_grow(pair):
    part = rollout_of("growing")
    assert [part.max_new_tokens.value(p) for p in (0.0, 0.25, 0.5, 1.0)] == [8, 68, 128, 128]
    for progress, length in ((0.0, 8), (0.125, 38)):
        rollout = pair.roll(part, prompts_of(40), progress)
        assert rollout.sampled.sum(-1).max() == rollout.mask.sum(-1).max() <= length
        assert progress > 0 or rollout.mask.shape[1] == length
        assert rollout.horizon.all()
        assert Finish.LENGTH not in rollout.finish.tolist()


def test_a_horizon_may_jump(pair):
    jump = "{_target_: opd_lightning.schedule.Step, before: 4, after: 9, at: 0.5}"
    part = rollout_of("esr", max_new_tokens=jump)
    assert [pair.roll(part, progress=p).mask.shape[1] for p in (0.49, 0.5)] == [4, 9]


def test_gold_text_lies_in_the_vocabulary(pair):
    assert int(pair.gold(prompts_of()).ids.max()) < VOCAB
