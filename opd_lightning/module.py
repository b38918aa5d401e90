"""The learning half of a run: experience to gradient, as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from opd_lightning.diagnostics.responses import ResponseMetrics
from opd_lightning.errors import require
from opd_lightning.objective import Objective
from opd_lightning.optim import settings_of, settle
from opd_lightning.protocols import Averaged, Follows
from opd_lightning.resume.loops import begin_at
from opd_lightning.scorer import Scorer
from opd_lightning.sharding import scorer_of, scores_of, shard, total_norm, unsharded, wrap
from opd_lightning.types import Experience, Graded


class OnPolicyDistillation(L.LightningModule):
    """Trains a student on experience; ``training_step`` is a pure function of what was collected.

    Optimization is Lightning's automatic one: accumulation, clipping, precision and strategies then work
    as anywhere in Lightning, and ``global_step`` counts optimizer steps. The one thing that it gets wrong
    for a token-weighted loss, dividing by ``accumulate_grad_batches`` and averaging over ranks, is undone
    in :meth:`training_step`, since each token's share was already counted over the whole optimizer step.

    Args:
        student: the trained scorer; the only parameters of this module.
        objective: what is minimised.
        optimizer: from parameters to an optimizer.
        scheduler: from an optimizer and the planned optimizer steps to a scheduler; None for a constant rate.
        follower: a teacher that takes over from the student after each optimizer step; None for a frozen one.
    """

    def __init__(
        self,
        student: Scorer,
        objective: Objective,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        follower: Follows | None = None,
    ) -> None:
        super().__init__()
        self.student: nn.Module = student
        self.objective = objective
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.greedy, self.sampled = ResponseMetrics(), ResponseMetrics()
        self._sums: dict[str, Tensor] = {}
        self._sharded = False
        # Not an attribute that nn.Module would register: a teacher's weights are in no state dict.
        self.__dict__["follower"] = follower
        self._progress = 0.0
        self.stepping = False
        self._settings: list[dict[str, Any]] = []
        self._norm: Tensor | None = None
        self.skip_step = False  # set before an optimizer step: it is logged, and nothing learns from it
        self.noted: dict[str, float] = {}  # numbers of callbacks, logged with each step's own

    @property
    def scorer(self) -> Scorer:
        """The student without a strategy's wrapper."""
        return scorer_of(self.student)

    def configure_model(self) -> None:
        """Shard the student under ``strategy=fsdp`` and ``fsdp1``; elsewhere it stays as it is."""
        mesh, strategy = getattr(self, "device_mesh", None), self.trainer.strategy
        if self._sharded:
            return
        if mesh is not None:
            shard(self.scorer, mesh["data_parallel"])
            self._sharded = True
        elif isinstance(strategy, FSDPStrategy):
            self.student = wrap(self.scorer, strategy.root_device)
            self._sharded = True

    def training_step(self, experience: Experience, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the optimizer step's loss, scaled against Lightning's means."""
        answer = self.student(
            experience.rollout.tokens,
            self.objective.want,
            experience.support_ids,
            experience.hidden,
            experience.share if self.objective.shares_alone else None,
        )
        scores = scores_of(answer)
        loss, metrics = self.objective.loss(scores, experience, experience.progress)
        tokens = (experience.share > 0).sum().to(loss.dtype)
        parts = {"loss": loss.detach(), **metrics, "tokens": tokens}
        for name, part in parts.items():
            self._sums[f"train/{name}"] = self._sums.get(f"train/{name}", torch.zeros_like(part)) + part
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the optimizer step's loss and metrics, summed over micro-batches and ranks, and the gradient norm."""
        if self._between():
            return
        sums = self.trainer.strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum")
        assert isinstance(sums, Tensor)
        logged = dict(zip(self._sums, sums.tolist(), strict=True))
        self._sums.clear()
        # What the collecting half saw of the responses behind this step, given once a collection.
        collected: dict[str, float] = getattr(
            getattr(self.trainer, "datamodule", None), "take_metrics", dict
        )()
        rate = self.noted | {"train/lr": optimizer.param_groups[0]["lr"]}
        if not self.trainer.strategy.handles_gradient_accumulation:  # DeepSpeed knows the norm after its step
            rate["train/grad_norm"] = float(self.gradient_norm())
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % every == 0 or collected:
            self._write(logged | collected | rate)
        self.log_dict(logged | collected | rate, logger=False)
        self.log("loss", logged["train/loss"], prog_bar=True, logger=False)
        self._norm = None
        if self.skip_step:
            # Without gradients no optimizer changes a weight or its state, nor decays it; a loss scaler skips too.
            self.zero_grad(set_to_none=True)

    def _write(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Give the loggers metrics of the run after the optimizer steps taken so far.

        At once, and not when Lightning does, which is after the step's checkpoint is written and again, for a
        metric of a collection, at each later step.
        """
        values = {name: float(value) for name, value in metrics.items()}
        for logger in self.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)

    def on_train_start(self) -> None:
        """Go on with the optimizer's settings and the schedule of now: a checkpoint has put back those of then."""
        schedules = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        settle(self.trainer.optimizers[0], self._settings, schedules[0] if schedules else None)

    def on_train_batch_start(self, batch: Experience, batch_idx: int) -> None:
        """Keep Lightning's own count of steps, for callbacks that log, equal to the optimizer's."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        self._progress = batch.progress

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, and let a teacher that follows the student take its new weights, before any checkpoint."""
        self.stepping = True
        super().optimizer_step(*args, **kwargs)
        if not self._between():
            if self.trainer.strategy.handles_gradient_accumulation:
                self._write({"train/grad_norm": self.trainer.model.get_global_grad_norm()})  # type: ignore[union-attr, operator]
            follower: Follows | None = self.__dict__["follower"]
            skipped, self.skip_step = self.skip_step, False
            if follower is not None and not skipped:
                with unsharded(self.scorer):
                    follower.follow(self.scorer, self._progress)
        self.stepping = False

    def _between(self) -> bool:
        """Return whether a strategy that accumulates by itself, DeepSpeed's, is asked between two steps."""
        itself = self.trainer.strategy.handles_gradient_accumulation
        return itself and bool(self.trainer.fit_loop._should_accumulate())

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add a teacher that is an average over the run, which no one could make again."""
        follower = self.__dict__["follower"]
        if isinstance(follower, Averaged):
            checkpoint["teacher"] = follower.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the average back, and begin at a whole optimizer step, however its micro-batches are cut now."""
        follower = self.__dict__["follower"]
        if isinstance(follower, Averaged) and "teacher" in checkpoint:
            follower.load_state_dict(checkpoint["teacher"])
        if self._trainer is not None and "loops" in checkpoint:
            done = int(checkpoint["global_step"]) * self.trainer.accumulate_grad_batches
            begin_at(checkpoint["loops"], done)

    def gradient_norm(self) -> Tensor:
        """Return the L2 norm before clipping, of the whole gradient; between backward and the optimizer's step."""
        if self._norm is None:
            self._norm = total_norm(self.student)
        return self._norm

    def validation_step(self, graded: Graded, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch of graded responses."""
        (self.greedy, self.sampled)[dataloader_idx].update(graded)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy, length and truncation: ``eval/*`` greedy, ``eval/*_sampled`` at a temperature."""
        found: dict[str, Tensor] = {}
        for metric, suffix in ((self.greedy, ""), (self.sampled, "_sampled")):
            if metric.update_called:
                found |= {f"eval/{key}{suffix}": value for key, value in metric.compute().items()}
            metric.reset()
        if not found:
            return
        self._write(found)
        # The metrics were already computed over all ranks; their mean over ranks is what Lightning asks for.
        self.log_dict(found, sync_dist=True, logger=False)
        if "eval/accuracy" in found:
            self.log("accuracy", found["eval/accuracy"], prog_bar=True, logger=False, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and the scheduler stepped once an optimizer step."""
        planned = int(self.trainer.max_steps)
        require(
            planned > 0,
            "trainer.max_steps",
            "be the number of optimizer steps",
            planned,
            "schedules and progress need an end",
        )
        optimizer = self.make_optimizer(p for p in self.student.parameters() if p.requires_grad)
        self._settings = settings_of(optimizer)
        if self.make_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.make_scheduler(optimizer, planned), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}
