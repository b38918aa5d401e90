"""Problems to token ids: chat templates, length limits, and the order in which a run sees them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.chat import encode, left_padded
from opd_lightning.errors import ConfigError, require
from opd_lightning.seeds import mix
from opd_lightning.types import Problem, PromptBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A split of a task as an endless, seeded stream of tokenized prompts.

    Problem ``i`` of the stream is a pure function of (seed, i): each pass over the split is a
    permutation of it. In-memory splits are checked against the length limit at construction.

    Args:
        problems: the split.
        tokenizer: the student's; its chat template is applied with a generation prompt.
        max_tokens: the longest prompt, in tokens.
        long: ``"drop"`` leaves longer prompts out and says how many, ``"refuse"`` stops the run.
        seed: of the order and of the rollouts' seeds.
        pool: only the first so many problems that fit are used; None for all of them.
        group: of the settings ``max_prompt_tokens``, ``long_prompts``, ``prompt_pool``, for errors to name.

    Raises:
        ConfigError: a pool below 1, a prompt over the limit with ``"refuse"``, or none left with ``"drop"``.
    """

    problems: Sequence[Problem]
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    long: Literal["drop", "refuse"]
    seed: int
    pool: int | None = None
    group: str = "collector."
    kept: Sequence[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require(
            isinstance(self.max_tokens, int) and self.max_tokens >= 1,
            f"{self.group}max_prompt_tokens",
            "be a whole number of at least 1",
            self.max_tokens,
            "use 1024",
        )
        require(
            self.long in ("drop", "refuse"),
            f"{self.group}long_prompts",
            "be drop or refuse",
            self.long,
            "use drop",
        )
        pool = self.pool
        require(
            pool is None or (isinstance(pool, int) and not isinstance(pool, bool) and pool >= 1),
            f"{self.group}prompt_pool",
            "be a whole number of at least 1, or null",
            pool,
            "use null for every problem",
        )
        kept: Sequence[int] = range(len(self.problems))
        if isinstance(self.problems, list | tuple):
            lengths = [len(self.encode(problem)) for problem in self.problems]
            kept = [i for i, n in enumerate(lengths) if n <= self.max_tokens]
            if dropped := len(lengths) - len(kept):
                self._report(dropped, len(lengths), max(lengths), self.long == "refuse" or not kept)
        object.__setattr__(self, "kept", kept[:pool])

    def _report(self, dropped: int, of: int, longest: int, refuse: bool) -> None:
        remedy = f"raise {self.group}max_prompt_tokens to {longest}"
        share = f"{dropped} of {of} prompts are longer than {self.max_tokens} tokens"
        if refuse:
            drop = f" or set {self.group}long_prompts=drop" if self.long == "refuse" and dropped < of else ""
            raise ConfigError(
                f"`{self.group}max_prompt_tokens` must cover the prompts, got {self.max_tokens}: {share} "
                f"(the longest has {longest}); {remedy}{drop}"
            )
        log.warning("%s and are left out; %s to keep them", share, remedy)

    @property
    def known(self) -> Sequence[Problem]:
        """The problems that are kept, where they are in memory; none of a generated split."""
        held = isinstance(self.problems, list | tuple)
        return [self.problems[int(i)] for i in self.kept] if held else ()

    def __len__(self) -> int:
        return len(self.kept)

    def encode(self, problem: Problem) -> list[int]:
        """Return the prompt's token ids, chat template applied where the tokenizer has one."""
        return encode(self.tokenizer, problem.messages)

    def stream(self, positions: Sequence[int]) -> PromptBatch:
        """Return the prompts at ``positions`` of the endless stream, each with its own seed."""
        indices = [self._at(position) for position in positions]
        return self._batch(indices, [mix(self.seed, "stream", p) for p in positions])

    def first(self, rows: Sequence[int]) -> PromptBatch:
        """Return the prompts at places ``rows`` of the split's own order (evaluation)."""
        indices = [int(self.kept[row]) for row in rows]
        return self._batch(indices, [mix(self.seed, "split", i) for i in indices])

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.kept))
        return int(self.kept[int(_order(self.seed, epoch, len(self.kept))[offset])])

    def _batch(self, indices: Sequence[int], seeds: Sequence[int]) -> PromptBatch:
        problems = [self.problems[i] for i in indices]
        encoded = [self.encode(problem) for problem in problems]
        longest = max(map(len, encoded))
        if longest > self.max_tokens:
            # Only a generated split comes here: it cannot be searched for long prompts beforehand.
            long = sum(len(ids) > self.max_tokens for ids in encoded)
            self._report(long, len(encoded), longest, refuse=True)
        ids, mask = left_padded(encoded)
        return PromptBatch(ids=ids, mask=mask, problems=tuple(problems), seeds=tuple(seeds))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(mix(seed, "order", epoch))
    return torch.randperm(n, generator=generator)
