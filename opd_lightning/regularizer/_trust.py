"""What a trust region reads, and which of its settings go together."""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.functional.masked import masked_fill
from opd_lightning.functional.ratio import log_ratio
from opd_lightning.schedule import within
from opd_lightning.types import Experience

Outlier = Literal["clip", "mask", "forward_kl"]
Gate = Literal["bernoulli", "expected", "threshold"]
Gradient = Literal["direct", "scalar"]

_WORDS = {
    "outlier": ("clip", "mask", "forward_kl"),
    "gate": ("bernoulli", "expected", "threshold"),
    "gradient": ("direct", "scalar"),
}
_NAME = "regularizer.trust_region"
_LARGEST = sys.float_info.max


def collected_ratio(experience: Experience) -> Float[Tensor, "batch time"]:
    """Return r = log T(y) - log S(y) with the student at collection; 0 off the student's own tokens.

    Raises:
        ConfigError: if either was not collected.
    """
    teacher, student = experience.teacher_taken_logp, experience.collected_logp
    if teacher is None or student is None:
        raise ConfigError(f"`{_NAME}` needs both models' log-probs of the taken token from the collection")
    sampled = experience.rollout.sampled
    return log_ratio(masked_fill(student, sampled), masked_fill(teacher, sampled)).detach()


def check(part: Any) -> None:
    """Raise ConfigError for settings of a trust region that are unknown, unread or without an effect."""
    for name, words in _WORDS.items():
        value = getattr(part, name)
        require(value in words, f"{_NAME}.{name}", f"be one of {', '.join(words)}", value, f"use {words[-1]}")
    _check_threshold(part)
    if part.outlier != "forward_kl":
        unread = {"gradient": "direct", "teacher_renormalised": False, "coefficient": 1.0}
        for name, idle in unread.items():
            value = getattr(part, name)
            condition = f"be {idle} with outlier={part.outlier}, which has no forward KL"
            require(
                value == idle, f"{_NAME}.{name}", condition, value, "leave it out, or use outlier=forward_kl"
            )
    require(
        within(part.coefficient, 0.0, _LARGEST),
        f"{_NAME}.coefficient",
        "be a finite number of at least 0",
        part.coefficient,
        "use 1 for the paper's",
    )


def _check_threshold(part: Any) -> None:
    field, theta = f"{_NAME}.threshold", part.threshold
    if part.outlier != "clip" and part.gate != "threshold":
        condition = f"be null with gate={part.gate} and outlier={part.outlier}, which read none"
        require(theta is None, field, condition, theta, "use gate=threshold or outlier=clip to have one")
        return
    numbers = within(theta, -math.inf, math.inf)
    require(numbers, field, "be a number of nats for gate=threshold and outlier=clip", theta, "use -1.72")
    if part.outlier == "clip":
        low = -math.inf if part.gate == "threshold" else -_LARGEST
        condition = "be at most 0 for outlier=clip" + (", and finite" if low > -math.inf else "")
        require(within(theta, low, 0.0), field, condition, theta, "use -1.72")
    elif part.outlier == "mask":
        lets_in = within(theta, -math.inf, _LARGEST)
        require(
            lets_in, field, "let some token in for outlier=mask, or nothing is taught", theta, "use -1.72"
        )
    elif part.gradient == "scalar":
        condition = (
            "let some token in for gradient=scalar (a number of the position alone as advantage on all tokens "
            "has an expected gradient of exactly 0)"
        )
        remedy = "use a finite threshold, or gradient=direct for the forward KL at every token"
        require(within(theta, -math.inf, _LARGEST), field, condition, theta, remedy)
