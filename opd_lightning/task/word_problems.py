"""The built-in task: word problems with a written-out chain of thought and one integer answer.

A problem tells how many of one item somebody has, then changes the number step by step or passes on to
another person, sometimes with a sentence that does not matter. The gold response writes one equation a
line between ``<think>`` tags and boxes the last value, so that errors compound with length as they do in
real reasoning.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from opd_lightning.errors import require
from opd_lightning.seeds import mix
from opd_lightning.task.grading import grade_answer
from opd_lightning.types import Problem

NAMES = ("Amy", "Ben", "Dan", "Eva", "Kim", "Leo", "Max", "Mia", "Sam", "Tom", "Uma", "Zoe")
ITEMS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")
GAINS = (("buys {b} more", "Buys"), ("finds {b} more", "Finds"), ("gets {b} from a friend", "Gets"))
LOSSES = (("gives away {b}", "Gives"), ("loses {b}", "Loses"), ("sells {b}", "Sells"))

# A problem's text decides its split, so that no text can be in two of them.
_BUCKETS = 20
_SPLIT_OF_BUCKET = {0: "validation", 1: "test"}


@dataclass(frozen=True, kw_only=True)
class WordProblems:
    """Generates the problems of each split, lazily and reproducibly.

    Args:
        min_steps, max_steps: changes to the running value in a problem, both included; the main knob of
            difficulty and length (about 17 response tokens a step).
        max_operand: largest number added or taken away.
        max_value: largest running value; none is negative.
        p_multiply: chance that a step doubles or halves, where that stays whole and in range.
        p_hop: chance that a step compares with a new person.
        p_distractor: chance of a sentence about another person's items.
        seed: of all problems.
        train_size, validation_size, test_size: problems of each split.

    Raises:
        ConfigError: a range that holds nothing, more people in a problem than there are names, chances
            or sizes that are none.
    """

    min_steps: int = 3
    max_steps: int = 6
    max_operand: int = 20
    max_value: int = 99
    p_multiply: float = 0.15
    p_hop: float = 0.25
    p_distractor: float = 0.3
    seed: int = 0
    train_size: int = 1_000_000
    validation_size: int = 256
    test_size: int = 1024

    def __post_init__(self) -> None:
        steps = f"{self.min_steps}..{self.max_steps}"
        # Every step may bring in a person, and a distractor one more.
        fits = 1 <= self.min_steps <= self.max_steps <= len(NAMES) - 2
        require(fits, "task.min_steps..max_steps", f"lie in 1..{len(NAMES) - 2}", steps, "use 3 and 6")
        require(self.max_operand >= 1, "task.max_operand", "be at least 1", self.max_operand, "use 20")
        require(self.max_value >= 20, "task.max_value", "be at least 20", self.max_value, "use 99")
        shares = (self.p_multiply, self.p_hop, self.p_distractor)
        holds = all(0 <= p <= 1 for p in shares) and self.p_multiply + self.p_hop <= 1
        require(holds, "task.p_*", "be chances, p_multiply + p_hop at most 1", shares, "use 0.15, 0.25, 0.3")
        least = {"train_size": 1, "validation_size": 0, "test_size": 0}
        for name, fewest in least.items():
            size = getattr(self, name)
            require(size >= fewest, f"task.{name}", f"be at least {fewest} problems", size, "use 256")

    def problems(self, split: str) -> Split:
        """Return a split: ``"train"``, ``"validation"`` or ``"test"``."""
        sizes = {"train": self.train_size, "validation": self.validation_size, "test": self.test_size}
        require(split in sizes, "split", f"be one of {', '.join(sizes)}", split, "use validation")
        return Split(self, split, sizes[split])

    def grade(self, problem: Problem, response: str) -> float | None:
        """Return 1.0 if the boxed answer after the chain of thought is the problem's, else 0.0."""
        return None if problem.answer is None else grade_answer(response, problem.answer)


@dataclass(frozen=True)
class Split(Sequence[Problem]):
    """The problems of one split; each is a pure function of seed, split and place."""

    task: WordProblems
    name: str
    size: int

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(index)
        place, attempt = index % self.size, 0
        while True:
            text = _generate(self.task, random.Random(mix(self.task.seed, self.name, place, attempt)))
            if split_of(text.prompt) == self.name:
                return text.problem(place)
            attempt += 1


def split_of(prompt: str) -> str:
    """Return the one split that a problem's text belongs to."""
    return _SPLIT_OF_BUCKET.get(mix(prompt) % _BUCKETS, "train")


@dataclass
class _Text:
    """A problem while it is written."""

    who: str
    value: int
    sentences: list[str]
    lines: list[str]
    steps: int
    names: list[str] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        return " ".join(self.sentences)

    def problem(self, index: int) -> Problem:
        thought = "\n".join(self.lines)
        return Problem(
            index=index,
            messages=({"role": "user", "content": self.prompt},),
            answer=str(self.value),
            response=f"<think>\n{thought}\n</think>\nThe answer is \\boxed{{{self.value}}}.",
            difficulty=f"{self.steps} steps",
        )


def _generate(task: WordProblems, rng: random.Random) -> _Text:
    names, items = rng.sample(NAMES, len(NAMES)), rng.sample(ITEMS, len(ITEMS))
    who, item, start = names.pop(), items.pop(), rng.randint(2, 20)
    text = _Text(
        who=who,
        value=start,
        sentences=[f"{who} has {start} {item}."],
        lines=[f"{who} starts with {start}."],
        steps=rng.randint(task.min_steps, task.max_steps),
        names=names,
    )
    for _ in range(text.steps):
        _step(task, rng, text)
    if rng.random() < task.p_distractor:
        place = rng.randint(1, len(text.sentences))
        text.sentences.insert(place, f"{names.pop()} has {rng.randint(2, 20)} {items.pop()}.")
    text.sentences.append(f"How many {item} does {text.who} have now?")
    return text


def _step(task: WordProblems, rng: random.Random, text: _Text) -> None:
    kind, v = rng.random(), text.value
    if kind < task.p_multiply / 2 and 2 * v <= task.max_value:
        _pass_on(text, f"twice as many as {text.who}", "twice as many", f"{v}*2", v * 2)
    elif task.p_multiply / 2 <= kind < task.p_multiply and v >= 2 and v % 2 == 0:
        _pass_on(text, f"half as many as {text.who}", "half as many", f"{v}/2", v // 2)
    else:
        up = v == 0 or (v < task.max_value and rng.random() < 0.5)
        b = rng.randint(1, min(task.max_operand, task.max_value - v if up else v))
        sum_, w = (f"{v}+{b}", v + b) if up else (f"{v}-{b}", v - b)
        if task.p_multiply <= kind < task.p_multiply + task.p_hop:
            word = "more" if up else "less"
            _pass_on(text, f"{b} {word} than {text.who}", f"{b} {word}", sum_, w)
        else:
            told, head = rng.choice(GAINS if up else LOSSES)
            text.sentences.append(f"{text.who} {told.format(b=b)}.")
            text.lines.append(f"{head} {b}: {sum_}={w}.")
            text.value = w


def _pass_on(text: _Text, told: str, head: str, sum_: str, value: int) -> None:
    """Let a new person have what is ``told`` of the one before."""
    new = text.names.pop()
    text.sentences.append(f"{new} has {told}.")
    text.lines.append(f"{new} has {head}: {sum_}={value}.")
    text.who, text.value = new, value
