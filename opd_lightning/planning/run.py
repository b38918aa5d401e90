"""A planned run as numbers: models, placement, batch, lengths and what is asked of each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opd_lightning.errors import require
from opd_lightning.planning.shapes import ModelShape

Compute = Literal["float32", "mixed", "half"]
"""What forward and backward compute in: float32; half types beside float32 weights; half types throughout."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """What a strategy divides over the processes.

    ``buckets``: that gradients have a second copy, to be summed over the processes. ``whole``: that divided
    weights are gathered as a whole for a collection.
    """

    name: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    buckets: bool = False
    whole: bool = True


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A model beside the student.

    ``copy`` is False where it is the student itself, ``host`` if it waits on the CPU, ``divided`` if each
    process holds a part of it.
    """

    role: str
    shape: ModelShape
    width: float
    copy: bool = True
    host: bool = False
    divided: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """All that an estimate follows from.

    Args:
        student: its shape; ``width`` the bytes of a weight, ``compute`` the precision of its passes.
        frozen: teachers and the reference, where they are in this process.
        optimizer_states: bytes of optimizer state for a byte of trained weight; ``optimizer_fused`` where a step
            makes no copies.
        sharding: what the strategy divides over ``processes``, on ``nodes``.
        device: cpu or cuda.
        checkpointing: whether activations are computed again in the backward pass.
        prompts, collection_steps: of a collection, over all processes; ``samples`` responses a prompt.
        steps: optimizer steps; ``accumulate`` micro-batches each, or as many as ``micro_batch_tokens`` asks for.
        prompt_tokens: of a prompt; ``longest`` and ``mean`` response, over the run.
        support: ids kept at a response position; ``full`` where hidden states are kept in their place.
        exact_learning: whether the student is asked for the whole vocabulary in the learning half.
        student_scored: whether the student scores its responses at collection.
        probe_rows: responses of each process and collection that it scores for the diagnostics.
        score_rows, score_tokens: of one forward of a scorer.
        scratch: bytes of logits that may be alive at once.
        writers: who writes responses.
        engine: ``here`` (the student's own weights), ``copy`` (an engine with a copy) or ``server``;
            ``engine_rows`` responses at once, ``engine_cache`` bytes where the engine reserves its cache.
        evaluations: how often held-out problems are answered; ``evaluation_rows`` responses of at most
            ``evaluation_tokens`` each time.
        runtime: bytes that the libraries and the device's context take before anything is loaded.
    """

    student: ModelShape
    width: float
    compute: Compute
    frozen: tuple[Frozen, ...]
    optimizer_states: float
    optimizer_fused: bool
    sharding: Sharding
    processes: int
    nodes: int
    device: str
    checkpointing: bool
    prompts: int
    collection_steps: int
    samples: int
    steps: int
    accumulate: int
    micro_batch_tokens: int | None
    prompt_tokens: int
    longest: int
    mean: float
    support: int
    full: bool
    exact_learning: bool
    student_scored: bool
    probe_rows: int
    score_rows: int
    score_tokens: int | None
    scratch: float
    writers: frozenset[str]
    engine: str
    engine_rows: int
    engine_cache: float | None
    evaluations: int
    evaluation_rows: int
    evaluation_tokens: int
    runtime: float

    def __post_init__(self) -> None:
        per_step = self.prompts // self.collection_steps
        require(
            per_step % self.processes == 0,
            "collector.prompts_per_collection",
            f"give each optimizer step a multiple of {self.processes} prompts (one share a process)",
            self.prompts,
            f"use {-(-per_step // self.processes) * self.processes * self.collection_steps}",
        )

    @property
    def collection_rows(self) -> int:
        """Responses of a collection on one process."""
        return self.prompts * self.samples // self.processes

    @property
    def step_rows(self) -> int:
        """Responses of an optimizer step on one process."""
        return self.collection_rows // self.collection_steps

    @property
    def longest_row(self) -> int:
        """Tokens of a prompt with the longest response."""
        return self.prompt_tokens + self.longest

    @property
    def micro_batch_rows(self) -> int:
        """Responses of the largest micro-batch, each at its longest."""
        if self.micro_batch_tokens is not None:
            return max(1, min(self.step_rows, self.micro_batch_tokens // self.longest_row))
        return max(1, -(-self.step_rows // self.accumulate))

    @property
    def scoring_rows(self) -> int:
        """Responses of one forward of a scorer, each at its longest."""
        if self.score_tokens is not None:
            return max(1, min(self.collection_rows, self.score_tokens // self.longest_row))
        return min(self.score_rows, self.collection_rows)
