"""Where Lightning's loops stand in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COUNTS = ("ready", "started", "processed", "completed")


def begin_at(loops: Mapping[str, Any], batches: int) -> None:
    """Have the training loop of a checkpoint go on behind ``batches`` whole micro-batches, in place.

    A checkpoint may be written within an optimizer step, whose gradients so far are lost, and the number of
    micro-batches may be another one now: what was done is counted in optimizer steps. Nothing is left half done
    of an evaluation, which is answered anew or was finished.
    """
    loop = loops["fit_loop"]
    for name, progress in loop.items():
        if name == "epoch_loop.batch_progress":
            for which in ("total", "current"):
                progress[which] |= dict.fromkeys(_COUNTS, batches)
            progress["is_last_batch"] = False
        elif name.startswith("epoch_loop.val_loop.") and name.endswith("batch_progress"):
            for which in ("total", "current"):
                progress[which] |= dict.fromkeys(_COUNTS, 0)
