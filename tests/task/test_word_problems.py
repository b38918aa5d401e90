"""The generator: true arithmetic, determinism, and splits that share no text."""

import re

import pytest
from omegaconf import OmegaConf

from opd_lightning.errors import ConfigError
from opd_lightning.paths import CONF_DIR
from opd_lightning.protocols import Task
from opd_lightning.task.word_problems import ITEMS, NAMES, WordProblems, split_of
from opd_lightning.types import Problem

EQUATION = re.compile(r": (\d+)([-+*/])(\d+)=(\d+)\.$")
APPLY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,  # true division: half of an odd number would not be the written whole number
}


def text_of(problem: Problem) -> str:
    return problem.messages[0]["content"]


def replay(prompt: str) -> tuple[int, int]:
    """Solve a prompt from its sentences alone: the answer and the number of steps."""
    *sentences, question = re.findall(r"[^.?]+[.?]", prompt)
    holdings: dict[str, tuple[int, str]] = {}
    item = re.search(r"How many (\w+) does (\w+) have now", question)
    assert item
    steps = 0
    for sentence in (s.strip() for s in sentences):
        name = sentence.split()[0]
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if (start := re.fullmatch(r"\w+ has \d+ (\w+)\.", sentence)) and start[1] in ITEMS:
            holdings[name] = (numbers[0], start[1])
            continue
        steps += 1
        other = re.search(r"(?:than|as many as) (\w+)\.$", sentence)
        value, what = holdings[other[1] if other else name]
        if "twice" in sentence:
            value *= 2
        elif "half" in sentence:
            value //= 2
        else:
            down = re.search(r"less|gives away|loses|sells", sentence)
            value += -numbers[0] if down else numbers[0]
        holdings[name] = (value, what)
    value, what = holdings[item[2]]
    assert what == item[1]
    return value, steps


def test_gold_lines_hold_and_values_stay_in_range():
    for problem in WordProblems(min_steps=1, max_steps=10).problems("train")[:1500]:
        first, *lines = problem.response.split("<think>\n")[1].split("\n</think>")[0].split("\n")
        value = int(re.search(r"starts with (\d+)\.$", first)[1])
        for line in lines:
            a, sign, b, c = EQUATION.search(line).groups()
            assert int(a) == value, "a line starts from the value before it"
            assert APPLY[sign](int(a), int(b)) == int(c)
            value = int(c)
            assert 0 <= value <= 99
        assert problem.response.endswith(f"</think>\nThe answer is \\boxed{{{value}}}.")
        assert problem.answer == str(value)
        assert problem.difficulty == f"{len(lines)} steps"


def test_the_sentences_alone_give_the_answer():
    task = WordProblems(min_steps=1, max_steps=10, p_distractor=0.5)
    for problem in task.problems("train")[:1500]:
        answer, steps = replay(text_of(problem))
        assert (str(answer), f"{steps} steps") == (problem.answer, problem.difficulty), text_of(problem)


def test_knobs_do_what_they_say():
    plain = WordProblems(min_steps=4, max_steps=4, p_multiply=0, p_hop=0, p_distractor=0, max_operand=5)
    for problem in plain.problems("train")[:200]:
        text = text_of(problem)
        assert problem.difficulty == "4 steps"
        assert sum(name in text for name in NAMES) == 1
        assert max(int(n) for n in re.findall(r"\d+", text.split(".", 1)[1])) <= 5
    hops = WordProblems(min_steps=4, max_steps=4, p_multiply=0, p_hop=1, p_distractor=1)
    for problem in hops.problems("train")[:200]:
        assert sum(name in text_of(problem) for name in NAMES) == 6  # 4 hops, the first one, the bystander
        assert sum(item in text_of(problem) for item in ITEMS) == 2


def test_a_problem_is_a_function_of_seed_split_and_place():
    first, second = (WordProblems().problems("train") for _ in range(2))
    backwards = [first[i] for i in reversed(range(200))][::-1]
    assert backwards == [second[i] for i in range(200)] == list(first[:200])
    assert first[-1] == first[len(first) - 1]
    assert first[7].index == 7
    other = WordProblems(seed=1).problems("train")
    assert not {text_of(p) for p in first[:200]} & {text_of(p) for p in other[:200]}


def test_sizes_do_not_change_the_problems():
    small, large = WordProblems(train_size=20), WordProblems(train_size=20_000)
    assert list(small.problems("train")) == list(large.problems("train")[:20])
    assert len(small.problems("train")) == 20
    with pytest.raises(IndexError):
        small.problems("train")[20]


def test_no_text_is_in_two_splits():
    # Short problems collide: 8,000 drawn one-step texts, of any seed, and none crosses over.
    easy = [WordProblems(min_steps=1, max_steps=2, seed=seed, validation_size=1000) for seed in range(2)]
    texts = {
        split: {text_of(p) for task in easy for p in task.problems(split)[:size]}
        for split, size in {"train": 3000, "validation": 500, "test": 500}.items()
    }
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    for split, members in texts.items():
        assert {split_of(text) for text in members} == {split}


def test_the_hash_of_a_text_is_stable():
    # Literal: if this moves, shipped checkpoints may have seen what is now held out.
    text = text_of(WordProblems().problems("validation")[0])
    assert (text, split_of(text)) == (FIRST_VALIDATION, "validation")


FIRST_VALIDATION = (
    "Uma has 14 coins. Tom has 15 more than Uma. Mia has 18 more than Tom. Mia loses 19. Mia loses 13. "
    "Mia finds 2 more. How many coins does Mia have now?"
)


def test_grades_its_own_gold_and_not_another_answer():
    task = WordProblems()
    assert isinstance(task, Task)
    problem = task.problems("test")[3]
    assert task.grade(problem, problem.response) == 1.0
    assert task.grade(problem, f"\\boxed{{{int(problem.answer) + 1}}}") == 0.0


def test_the_yaml_repeats_the_defaults():
    written = OmegaConf.load(CONF_DIR / "task" / "word_problems.yaml")
    target = written.pop("_target_")
    assert target == "opd_lightning.task.word_problems.WordProblems"
    assert WordProblems(**written) == WordProblems()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_steps": 0}, r"`task.min_steps..max_steps` must .*got '0..6'; use 3 and 6"),
        ({"min_steps": 5, "max_steps": 4}, r"got '5..4'"),
        ({"max_steps": 11}, r"must lie in 1..10, got '3..11'"),
        ({"max_operand": 0}, r"`task.max_operand` must be at least 1, got 0; use 20"),
        ({"max_value": 5}, r"`task.max_value` must be at least 20, got 5; use 99"),
        ({"p_hop": 0.9, "p_multiply": 0.2}, r"`task.p_\*` must .*p_multiply \+ p_hop at most 1"),
        ({"p_distractor": 1.5}, r"`task.p_\*` must .*1.5"),
        ({"validation_size": -1}, r"`task.validation_size` must be at least 0 problems, got -1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ConfigError, match=message):
        WordProblems(**settings)


def test_unknown_split():
    with pytest.raises(
        ConfigError, match="`split` must be one of train, validation, test, got 'dev'; use val"
    ):
        WordProblems().problems("dev")
