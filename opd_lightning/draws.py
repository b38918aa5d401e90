"""Random numbers per token that belong to a response, and to nothing that it is batched with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.seeds import mix


def uniform(seeds: Sequence[int], name: str, shape: tuple[int, int]) -> Float[Tensor, "batch time"]:
    """Return independent float32 numbers from U[0, 1) of ``shape`` = (batch, time), on the CPU.

    Row i depends on ``seeds[i]`` and ``name`` alone, and its first numbers are the same for every longer
    ``time``: neither neighbours nor padding change a draw. ``name`` keeps the streams of different parts apart.

    Raises:
        ValueError: if there is not one seed for each row.
    """
    rows, time = shape
    if len(seeds) != rows:
        raise ValueError(f"draws of {rows} rows need as many seeds, got {len(seeds)}")
    numbers = torch.empty(rows, time)
    generator = torch.Generator()
    for row, seed in zip(numbers, seeds, strict=True):
        row.uniform_(generator=generator.manual_seed(mix(seed, name)))
    return numbers
