"""What every rollout must keep, read off its yaml: a new file is tested the moment it exists."""

from dataclasses import fields, replace

import pytest
import torch
from rollouts import NAMES, STOPS, Pair, prompts_of, rollout_of, short, text, token_logp

from opd_lightning.errors import ConfigError
from opd_lightning.protocols import RolloutSampler
from opd_lightning.types import Finish, Origin

TOP_IDS = {"top_p", "esr", "esr_progressive", "growing", "linear_mix", "geometric"}
"""Rollouts whose every token has the student's own top ids."""
SETTINGS = {name: {f.name for f in fields(rollout_of(name))} for name in NAMES}
REFUSED = [
    ("max_new_tokens", 0, "at least 1 token"),
    ("max_new_tokens", "many", "at least 1 token"),
    ("temperature", -1, "(above|at least) 0"),
    ("top_p", 0, r"in \(0, 1\]"),
    ("top_k", -1, "whole number of at least 0"),
    ("min_p", 1, r"in \[0, 1\)"),
    ("loss_horizon", 0, "at least 1 token"),
    ("gold_horizon", 0, "at least 1 token"),
    ("samples", 0, "whole number of at least 1"),
    ("samples", 1.5, "whole number of at least 1"),
    ("samples", "many", "whole number of at least 1"),
    ("student_samples", -1, "whole number of at least 0"),
    ("gold_samples", 2, "at most 1 with rollout.gold=data"),
    ("teacher_temperature", -1, "finite number of at least 0"),
    ("text", "student", "teacher or data"),
    ("gold", "gold", "teacher or data"),
    ("fraction", 1.1, r"in \[0, 1\]"),
    ("fraction", "{_target_: opd_lightning.schedule.Linear, start: 0, end: 2}", r"in \[0, 1\]"),
    ("on_policy", -0.1, r"in \[0, 1\]"),
    ("alpha", 1.5, r"in \[0, 1\]"),
    ("epsilon", -0.5, "at least 0"),
    ("fixed", "maybe", "true or false"),
]
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@every
def test_is_a_rollout_and_asks_only_whom_it_declares(name, pair):
    part = short(name)
    assert isinstance(part, RolloutSampler)
    assert part == short(name)
    hash(part)
    pair.asked.clear()
    pair.roll(part)
    assert {who for who, *_ in pair.asked} <= part.writers


@every
def test_rows_are_grouped_prompt_by_prompt(name, pair):
    prompts, part = prompts_of(), short(name)
    rollout = pair.roll(part, prompts)
    samples = part.samples
    assert len(rollout.ids) == len(prompts) * samples
    assert rollout.group.tolist() == [i for i in range(len(prompts)) for _ in range(samples)]
    for row, group in enumerate(rollout.group.tolist()):
        assert rollout.prompt.problems[row] == prompts.problems[group]
        assert torch.equal(rollout.prompt.ids[row], prompts.ids[group])
        assert torch.equal(rollout.prompt.mask[row], prompts.mask[group])
    assert len(set(rollout.prompt.seeds)) == len(rollout.prompt.seeds)


@every
def test_padding_is_on_the_right_and_holds_nothing(name, pair):
    rollout = pair.roll(short(name))
    assert (rollout.mask.int().diff(dim=1) <= 0).all()
    assert rollout.mask.any(1).all()
    assert rollout.mask.any(0).all()  # cut to the longest row
    assert not rollout.mask.all()
    for values in (rollout.ids, rollout.origin, rollout.behavior_logp):
        assert (values[~rollout.mask] == 0).all()
    assert {t.shape for t in (rollout.ids, rollout.origin, rollout.horizon)} == {rollout.mask.shape}


@every
def test_finish_says_how_a_row_ended(name, pair):
    part = short(name)
    rollout = pair.roll(part)
    cut = Finish.HORIZON if getattr(part, "early_stop", False) else Finish.LENGTH
    for row in range(len(rollout.ids)):
        tokens, ended = text(rollout, row), int(rollout.finish[row]) == Finish.EOS
        assert ended == (tokens[-1] in STOPS)
        assert not set(tokens[:-1]) & set(STOPS)
        assert ended or (len(tokens) == 12 and int(rollout.finish[row]) == cut)
    assert set(rollout.finish.tolist()) == {int(Finish.EOS), int(cut)}


@every
def test_the_same_seeds_give_the_same_rollout_and_others_another(name, pair):
    prompts = prompts_of()
    first, again = pair.roll(short(name), prompts), pair.roll(short(name), prompts)
    for field in ("ids", "mask", "origin", "horizon", "finish"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert torch.equal(first.behavior_logp, again.behavior_logp)
    other = pair.roll(short(name), replace(prompts, seeds=tuple(range(6))))
    assert [text(other, r) for r in range(6)] != [text(first, r) for r in range(6)]


@every
def test_a_row_does_not_depend_on_its_neighbours(name, pair):
    prompts, part = prompts_of(), short(name)
    whole, samples = pair.roll(part, prompts), part.samples
    for chosen in ([4, 1], [5]):
        some = pair.roll(part, prompts.rows(chosen))
        for row in range(len(chosen) * samples):
            source = chosen[row // samples] * samples + row % samples
            length = int(some.mask[row].sum())
            assert text(some, row) == text(whole, source)
            for field in ("origin", "horizon"):
                ours, theirs = getattr(some, field)[row, :length], getattr(whole, field)[source, :length]
                assert torch.equal(ours, theirs)
            assert int(some.finish[row]) == int(whole.finish[source])


@every
def test_behavior_log_probs_are_the_writers(name, pair):
    """Untruncated and at temperature 1, so that each writer's own forward gives them; a mixed one in its own test."""
    part = short(name, temperature=1.0, top_p=1.0)
    if "mixed" in part.writers:
        pytest.skip("the sampler is neither model")
    rollout = pair.roll(part)
    for row in range(len(rollout.ids)):
        length = int(rollout.mask[row].sum())
        origin, got = rollout.origin[row, :length], rollout.behavior_logp[row, :length]
        for who, writer in ((Origin.STUDENT, "student"), (Origin.TEACHER, "teacher")):
            want = token_logp(pair.models[writer], rollout, row)
            assert torch.allclose(got[origin == who], want[origin == who], atol=1e-4)
        assert (got[origin == Origin.DATA] == 0).all()


@every
def test_top_ids_are_the_students_or_left_to_the_collector(name, pair):
    rollout = pair.roll(short(name), top_ids=4)
    if name not in TOP_IDS:
        assert rollout.top_ids is None
        return
    assert rollout.top_ids.shape == (*rollout.ids.shape, 4)
    prompt = rollout.prompt.ids[0][rollout.prompt.mask[0]].tolist()
    with torch.no_grad():
        logits = pair.models["student"](torch.tensor([prompt + text(rollout, 0)])).logits
    want = logits[0, len(prompt) - 1 : -1].topk(4, -1).indices
    assert torch.equal(rollout.top_ids[0, : len(want)], want)


@pytest.mark.parametrize(
    ("name", "field", "value", "says"),
    [(name, *case) for name in NAMES for case in REFUSED if case[0] in SETTINGS[name]],
    ids=str,
)
def test_what_cannot_be_is_refused_by_its_key(name, field, value, says):
    # The progressive horizon ends at max_new_tokens, and would speak first.
    alone = {"loss_horizon": None} if (name, field) == ("esr_progressive", "max_new_tokens") else {}
    with pytest.raises(ConfigError, match=rf"`rollout\.{field}` must .*{says}.*; "):
        rollout_of(name, **{field: value}, **alone)


@every
def test_has_the_key_that_a_short_run_sets(name):
    assert hasattr(rollout_of(name), "max_new_tokens")
    assert rollout_of(name, max_new_tokens=24).max_new_tokens == 24
