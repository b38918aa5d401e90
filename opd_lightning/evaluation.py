"""How held-out problems are answered, and the loader that divides them over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from opd_lightning.errors import require
from opd_lightning.types import Graded, Sampling
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How held-out problems are answered: once greedily, and ``samples`` times at ``temperature``.

    Args:
        problems: at most so many problems of the split; None for all.
        max_new_tokens: budget of a response; one that reaches it counts as wrong.
        temperature, top_p, top_k, min_p: of the sampled responses.
        samples: sampled responses a problem; 0 for greedy only.
        batch: problems generated together.
    """

    problems: int | None
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    samples: int
    batch: int

    def __post_init__(self) -> None:
        require(
            self.problems is None or self.problems >= 1,
            "evaluation.settings.problems",
            "be at least 1",
            self.problems,
            "use null for all",
        )
        for sampling, _ in self.modes():
            sampling.checked("evaluation.settings")
        require(
            self.samples >= 0,
            "evaluation.settings.samples",
            "be at least 0",
            self.samples,
            "use 0 for greedy only",
        )
        require(self.batch >= 1, "evaluation.settings.batch", "be at least 1", self.batch, "use 64")

    def modes(self) -> list[tuple[Sampling, int]]:
        """Return the sampling and samples a problem of each evaluation: greedy, then sampled."""
        greedy = Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0)
        sampled = Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
        )
        return [(greedy, 1)] + ([(sampled, self.samples)] if self.samples else [])


NO_ANSWER = Graded(
    correct=torch.zeros(0),
    lengths=torch.zeros(0, dtype=torch.long),
    truncated=torch.zeros(0, dtype=torch.bool),
    repetition=torch.zeros(0),
    repetitive=torch.zeros(0, dtype=torch.bool),
    group=torch.zeros(0, dtype=torch.long),
    difficulty=(),
    prompts=(),
    texts=(),
)
"""Of a rank that has no row left of a batch."""


class GradedLoader:
    """Yields graded responses to this rank's share of a split.

    Every rank yields the same number of batches, the last of them empty where its share is short: the
    ranks meet at each to gather sharded weights, and after all to sum the metrics.

    Args:
        count: problems of the split that are asked.
        batch: problems answered together.
        world: this process among all.
        answer: from the problems' rows to graded responses, :data:`NO_ANSWER` for no row.
    """

    def __init__(
        self, count: int, batch: int, world: World, answer: Callable[[Sequence[int]], Graded]
    ) -> None:
        self.batch, self.answer = batch, answer
        self.rows = range(world.rank, count, world.size)
        self.longest = -(-count // world.size)

    def __len__(self) -> int:
        return -(-self.longest // self.batch)

    def __iter__(self) -> Iterator[Graded]:
        for start in range(0, self.longest, self.batch):
            yield self.answer(self.rows[start : start + self.batch])
