"""Alarms on what the student writes: length, repetition, entropy. They warn, shorten the rollouts, or stop the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch.optim import Optimizer

from opd_lightning.errors import ConfigError, RunStopped, require
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.writing import Budget

log = logging.getLogger(__name__)

_ACTIONS = ("warn", "shorten", "stop")
_WATCHED = ("rollout/", "student/", "teacher/", "support/")
"""Metrics of a collection that are means over all processes, so that all of them act alike."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Goes off when the mean of a metric over ``window`` collections is over or under a threshold.

    Args:
        metric: of a collection, by the name that it is logged under.
        above, below: thresholds; None for none on that side.
        window: collections; the next ``window`` count anew after it went off.
        action: ``warn``; ``shorten`` halves the responses' longest length and warns; ``stop`` ends the run.

    Raises:
        ConfigError: no threshold, or a field out of its range.
    """

    metric: str
    above: float | None
    below: float | None
    window: int
    action: str

    def __post_init__(self) -> None:
        field = "callbacks.alarms.watch"
        known = isinstance(self.metric, str) and self.metric.startswith(_WATCHED)
        require(
            known,
            f"{field}.*.metric",
            f"begin with {', '.join(_WATCHED)}",
            self.metric,
            "use rollout/truncation",
        )
        for name in ("above", "below"):
            value = getattr(self, name)
            number = value is None or (isinstance(value, int | float) and math.isfinite(value))
            require(number, f"{field}.*.{name}", "be a number or null", value, "use null for no threshold")
        one = self.above is not None or self.below is not None
        require(
            one,
            f"{field}.*.above",
            "be a number where below is null",
            None,
            "set the alarm itself to null to leave it out",
        )
        whole = isinstance(self.window, int) and not isinstance(self.window, bool) and self.window >= 1
        require(whole, f"{field}.*.window", "be at least 1 collection", self.window, "use 4")
        require(
            self.action in _ACTIONS,
            f"{field}.*.action",
            f"be one of {', '.join(_ACTIONS)}",
            self.action,
            "use warn",
        )

    def said(self, mean: float) -> str | None:
        """Return what is wrong with a mean, None for nothing."""
        if self.above is not None and mean > self.above:
            return f"over {self.above:g}"
        if self.below is not None and mean < self.below:
            return f"under {self.below:g}"
        return None


class Alarms(L.Callback):
    """Watches every collection once, before the first optimizer step on it; shortening begins with the next.

    What an alarm has shortened stays short. A response that ends there was stopped early and not truncated: its
    finish is ``HORIZON``, so that an alarm on truncation does not answer itself. ``train/alarms`` counts how often
    one went off, ``rollout/length_share`` is the share of ``rollout.max_new_tokens`` that responses may have.

    Args:
        watch: alarms by name; null ones are left out.
        least_tokens: ``shorten`` goes no lower.

    Raises:
        ConfigError: a field out of its range.
        RunStopped: an alarm whose action is ``stop`` went off.
    """

    def __init__(self, watch: Mapping[str, Alarm | None], least_tokens: int) -> None:
        whole = isinstance(least_tokens, int) and not isinstance(least_tokens, bool) and least_tokens >= 1
        require(whole, "callbacks.alarms.least_tokens", "be at least 1 token", least_tokens, "use 16")
        self.alarms = {name: alarm for name, alarm in watch.items() if alarm is not None}
        for name, alarm in self.alarms.items():
            if not isinstance(alarm, Alarm):
                raise ConfigError(
                    f"`callbacks.alarms.watch.{name}` must be an alarm or null, got {alarm!r}; give it _target_, "
                    "metric, above, below, window and action, as the others have"
                )
        self.least_tokens = least_tokens
        self.fired = 0
        self.share = 1.0
        self._history: dict[str, list[float]] = {name: [] for name in self.alarms}
        self._stop: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen and what was shortened."""
        history = {name: list(values) for name, values in self._history.items()}
        return {"fired": self.fired, "share": self.share, "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was; alarms that it does not know begin anew."""
        self.fired, self.share = state_dict["fired"], state_dict["share"]
        for name, values in state_dict["history"].items():
            if name in self._history:
                self._history[name] = list(values)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shorten what a checkpoint had shortened."""
        budget = self._budget(trainer)
        budget.share, budget.least = self.share, self.least_tokens

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at a collection that was not looked at before."""
        assert isinstance(pl_module, OnPolicyDistillation)
        # The module takes the collection's metrics behind this hook, once.
        seen: Mapping[str, float] = getattr(getattr(trainer, "datamodule", None), "metrics", {})
        for name, alarm in self.alarms.items():
            if alarm.metric in seen:
                self._look(trainer, name, alarm, seen[alarm.metric])
        pl_module.noted["train/alarms"] = float(self.fired)
        pl_module.noted["rollout/length_share"] = self._budget(trainer).share

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop behind the optimizer step, so that what is saved can be gone on from."""
        if self._stop is not None:
            raise RunStopped(self._stop)

    def _look(self, trainer: L.Trainer, name: str, alarm: Alarm, value: float) -> None:
        history = self._history[name]
        history.append(value)
        del history[: -alarm.window]
        mean = math.fsum(history) / len(history)
        wrong = alarm.said(mean) if len(history) == alarm.window else None
        if wrong is None:
            return
        history.clear()
        self.fired += 1
        said = f"{alarm.metric} is {mean:.4g} over {alarm.window} collections, {wrong}"
        if alarm.action == "stop":
            self._stop = (
                f"`callbacks.alarms.watch.{name}` must not go off, got {said}; go on from the checkpoint with another "
                f"method or setting, or with callbacks.alarms.watch.{name}.action=warn"
            )
            return
        if alarm.action == "shorten":
            self.share /= 2
            self._budget(trainer).share = self.share
            said += f"; responses may have {self.share:g} of their length from the next collection on"
        if trainer.is_global_zero:
            log.warning("step %d, alarm %s: %s", trainer.global_step, name, said)

    @staticmethod
    def _budget(trainer: L.Trainer) -> Budget:
        collector = getattr(getattr(trainer, "datamodule", None), "collector", None)
        return getattr(collector, "budget", None) or Budget()
