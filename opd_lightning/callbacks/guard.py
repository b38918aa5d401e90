"""Steps whose loss or gradient is not finite are left out, shown, and counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from opd_lightning.errors import RunStopped, require
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.types import Experience

log = logging.getLogger(__name__)


class Guard(L.Callback):
    """Skips an optimizer step whose loss or gradient is not finite, on all ranks as soon as it is so on one.

    A skipped step changes neither weights nor the optimizer's state nor a teacher that follows the student. It
    counts all the same: progress, the learning rate's schedule and ``trainer.max_steps`` go on, so that the
    prompts of later steps are what they would have been. ``train/skipped_steps`` is their number so far.

    The responses behind it are written to ``folder/step_<step>_rank<rank>.jsonl``, of the micro-batches whose loss
    is not finite; of all where only the gradient is not. ``<step>`` is the one of ``metrics.csv``.

    Under ``trainer.precision=16-mixed`` a gradient beyond the range of float16 with a finite loss is how the loss
    scale is found: such a step is counted, but neither written nor counted towards the limit. DeepSpeed keeps
    its gradients to itself, so that nothing can be left out: the run stops at the first loss that is not finite.

    Args:
        limit: the run stops, with a checkpoint of the last good weights, after so many of them one after another.
        folder: for the responses.

    Raises:
        ConfigError: a limit below 1.
        RunStopped: the limit is reached.
    """

    def __init__(self, limit: int, folder: str) -> None:
        whole = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
        require(whole, "callbacks.guard.limit", "be at least 1 step", limit, "use 3, or ~callbacks.guard")
        self.limit = limit
        self.folder = Path(folder)
        self.skipped = 0
        self.in_a_row = 0
        self._reached = False
        self._batch: Experience | None = None
        self._passed: list[tuple[Experience, Tensor]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the counts of a checkpoint."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the micro-batch until its step is judged."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note whether the micro-batch's loss is finite, without waiting for the device."""
        assert self._batch is not None
        self._passed.append((self._batch, loss.detach().isfinite()))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Judge the step by its losses and its gradient, on all ranks alike."""
        assert isinstance(pl_module, OnPolicyDistillation)
        passed, self._passed, self._batch = self._passed, [], None
        finite = torch.stack([flag for _, flag in passed])
        itself = trainer.strategy.handles_gradient_accumulation  # DeepSpeed
        lost = torch.zeros_like(finite[0]) if itself else ~pl_module.gradient_norm().isfinite()
        flags = torch.stack([~finite.all(), lost]).float()
        reduced = trainer.strategy.reduce(flags, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        loss_bad, gradient_bad = (count > 0 for count in reduced.tolist())
        if loss_bad or gradient_bad:
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None and not loss_bad
            self._skip(
                trainer, pl_module, passed, finite.tolist(), "loss" if loss_bad else "gradient", scaled
            )
        else:
            self.in_a_row = 0
        pl_module.noted["train/skipped_steps"] = float(self.skipped)

    def _skip(
        self,
        trainer: L.Trainer,
        module: OnPolicyDistillation,
        passed: list[tuple[Experience, Tensor]],
        finite: list[bool],
        what: str,
        scaled: bool,
    ) -> None:
        self.skipped += 1
        module.skip_step = True
        if scaled:
            return
        self.in_a_row += 1
        self._reached = self.in_a_row >= self.limit
        blamed = [
            batch for (batch, _), good in zip(passed, finite, strict=True) if what != "loss" or not good
        ]
        path = self.folder / f"step_{trainer.global_step}_rank{trainer.global_rank}.jsonl"
        if blamed:
            self._write(path, blamed, trainer)
            log.warning("step %d is skipped: its %s is not finite; see %s", trainer.global_step, what, path)
        if trainer.strategy.handles_gradient_accumulation:
            self._stop(1, "under DeepSpeed, where no step can be left out")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the limit, behind the step: what is saved then can be gone on from."""
        if self._reached:
            self._stop(self.limit, "one after another")

    def _stop(self, count: int, how: str) -> None:
        raise RunStopped(
            f"`callbacks.guard.limit` must not be reached, got {count} optimizer steps {how} with a loss or gradient "
            f"that is not finite; look into {self.folder} for their responses, lower optimizer.lr or correct the "
            "part that made them, and go on from the checkpoint, whose weights are the last good ones"
        )

    def _write(self, path: Path, batches: list[Experience], trainer: L.Trainer) -> None:
        collector = getattr(getattr(trainer, "datamodule", None), "collector", None)
        tokenizer = getattr(collector, "tokenizer", None)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                for number, batch in enumerate(batches):
                    for row in described(batch):
                        text = (
                            {} if tokenizer is None else {"response": tokenizer.decode(row["response_ids"])}
                        )
                        file.write(json.dumps({"micro_batch": number} | row | text) + "\n")
        except OSError as error:  # a full disk must not end what the guard keeps alive
            log.warning("%s cannot be written: %s", path, error)


_SHOWN = {
    "behavior_logp": lambda e: e.rollout.behavior_logp,
    "teacher_logp": lambda e: e.teacher_taken_logp,
    "teacher_entropy": lambda e: e.teacher_entropy,
    "collected_logp": lambda e: e.collected_logp,
    "reference_logp": lambda e: e.reference_taken_logp,
    "share": lambda e: e.share,
}


def described(experience: Experience) -> list[dict[str, Any]]:
    """Return each row as plain values: ids, numbers per token, and which of the collected tensors are not finite.

    Numbers are written as Python's json does, ``NaN`` and ``Infinity`` among them.
    """
    rollout, rows = experience.rollout, []
    numbers = {name: read(experience) for name, read in _SHOWN.items()}
    collected = {name: v for name, v in vars(experience).items() if isinstance(v, Tensor)} | {
        f"extras.{name}": v for name, v in experience.extras.items()
    }
    for i in range(len(experience.share)):
        mask = rollout.mask[i]
        row: dict[str, Any] = {
            "prompt_ids": rollout.prompt.ids[i][rollout.prompt.mask[i]].tolist(),
            "response_ids": rollout.ids[i][mask].tolist(),
            "reward": None if experience.reward is None else float(experience.reward[i]),
        }
        row |= {name: v[i][mask].tolist() for name, v in numbers.items() if v is not None}
        row["not_finite"] = sorted(
            name
            for name, v in collected.items()
            if name != "reward" and v.ndim > 1 and not bool(_inside(v[i], mask).isfinite().all())
        )
        rows.append(row)
    return rows


def _inside(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values at the row's tokens, in floating point."""
    return values[mask].double() if len(values) == len(mask) else values.double()
