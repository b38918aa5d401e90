"""The sizes of a collection, checked before a model is loaded."""

from __future__ import annotations

import math

from opd_lightning.errors import ConfigError, require
from opd_lightning.protocols import RolloutSampler
from opd_lightning.schedule import value_at


def check_sizes(
    prompts_per_collection: int,
    steps_per_collection: int,
    score_rows: int,
    probe_rows: int,
    score_tokens: int | None = None,
) -> None:
    """Raise ConfigError unless the sizes of a collection fit together; needs no model."""
    least = {
        "steps_per_collection": (steps_per_collection, 1, "use 1 to train on each response once"),
        "score_rows": (score_rows, 1, "use 32"),
        "probe_rows": (probe_rows, 0, "use 0 for no probe"),
        "prompts_per_collection": (prompts_per_collection, 1, f"use {steps_per_collection}"),
    }
    if score_tokens is not None:
        least["score_tokens"] = (score_tokens, 1, "use null for score_rows responses each")
    for name, (value, low, remedy) in least.items():
        whole = isinstance(value, int) and value >= low
        require(whole, f"collector.{name}", f"be a whole number of at least {low}", value, remedy)
    per_step, rest = divmod(prompts_per_collection, steps_per_collection)
    require(
        rest == 0,
        "collector.prompts_per_collection",
        f"be a multiple of collector.steps_per_collection={steps_per_collection}",
        prompts_per_collection,
        f"use {(per_step + 1) * steps_per_collection}, since each optimizer step takes as many prompts",
    )


def longest_row(rollout: RolloutSampler, max_prompt_tokens: int) -> int:
    """Return the most tokens of a prompt with its response over a whole run.

    Raises:
        ConfigError: a rollout that does not say how long its responses may become.
    """
    longest = getattr(rollout, "max_new_tokens", None)
    if longest is None:
        raise ConfigError(
            f"`collector.micro_batch_tokens` must be null with a rollout that has no max_new_tokens, got "
            f"{type(rollout).__name__}; set trainer.accumulate_grad_batches"
        )
    # A schedule is monotone: it is longest at one of its ends.
    return max_prompt_tokens + math.ceil(max(value_at(longest, end) for end in (0.0, 1.0)))
