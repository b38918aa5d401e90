"""How an engine draws tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opd_lightning.errors import require


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an engine draws tokens. ``temperature=0`` is greedy decoding.

    Truncation follows the usual order: temperature, then top-k, top-p, min-p, each on what the one
    before it kept, renormalised. ``vocab`` is the shared vocabulary: no id at or above it is drawn.
    ``top_ids`` asks for the student's own top ids at each position (ranked before truncation).
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    vocab: int | None = None
    top_ids: int = 0

    def checked(self, owner: str = "sampling") -> Sampling:
        """Return these settings, each in its range.

        Args:
            owner: the configuration key that holds them, for the errors; ``""`` for the top level.

        Raises:
            ConfigError: a number out of its range, under the key that the user set.
        """
        wholes = {"max_new_tokens": (1, "raise it"), "top_k": (0, "use 0 to keep every token")}
        numbers: dict[str, tuple[bool, str, str]] = {
            "temperature": (
                _number(self.temperature) and 0 <= self.temperature < math.inf,
                "be a finite number of at least 0",
                "use 0 for greedy decoding and 1 for the model's own distribution",
            ),
            "top_p": (
                _number(self.top_p) and 0 < self.top_p <= 1,
                "be in (0, 1]",
                "use 1 to keep every token",
            ),
            "min_p": (
                _number(self.min_p) and 0 <= self.min_p < 1,
                "be in [0, 1)",
                "use 0 to keep every token",
            ),
        }
        for name, (least, remedy) in (wholes | {"top_ids": (0, "use 0 for none")}).items():
            value = getattr(self, name)
            holds = isinstance(value, int) and not isinstance(value, bool) and value >= least
            numbers[name] = (holds, f"be a whole number of at least {least}", remedy)
        for name, (holds, condition, remedy) in numbers.items():
            require(holds, f"{owner}.{name}" if owner else name, condition, getattr(self, name), remedy)
        return self
