"""The collecting half as a LightningDataModule: loaders that generate what they yield."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch

from opd_lightning.buffer import check_one_count, micro_batches
from opd_lightning.collector import Collector
from opd_lightning.diagnostics.collection import CollectionReport
from opd_lightning.diagnostics.utilisation import measured_peak
from opd_lightning.evaluation import NO_ANSWER, Evaluation, GradedLoader
from opd_lightning.processes import gathered_objects, world_of
from opd_lightning.prompts import Prompts
from opd_lightning.resume import randomness
from opd_lightning.resume.experience import packed, shared_out, unpacked, unpacked_rollout
from opd_lightning.scorer import Scorer
from opd_lightning.sharding import scorer_of, unsharded
from opd_lightning.types import Experience, Graded, Sampling
from opd_lightning.world import World

log = logging.getLogger(__name__)

_LAST_SECONDS = 60.0
"""How long the checkpoint of a run that ends by an exception waits for text that is being written."""


@runtime_checkable
class Movable(Protocol):
    """A teacher whose weights lie in this process."""

    def to(self, device: torch.device) -> object:
        """Move the weights to ``device``."""
        ...


class OnPolicyData(L.LightningDataModule):
    """Feeds a trainer: experience from the student's own rollouts, and graded held-out responses.

    The train loader collects just before it yields, from the student's current weights, and has a
    length; without one Lightning would fetch a batch ahead, from stale weights.

    Args:
        collector: the collecting half.
        validation: held-out prompts; None for no evaluation during training.
        evaluation: how they are answered.
        peak_tflops: what a process's device can do; None to measure it by a matrix product, once.
    """

    def __init__(
        self,
        collector: Collector,
        validation: Prompts | None,
        evaluation: Evaluation,
        peak_tflops: float | None = None,
    ) -> None:
        super().__init__()
        self.peak_tflops = peak_tflops
        self.collector = collector
        self.validation = validation
        self.evaluation = evaluation
        self.report: CollectionReport | None = None
        self.metrics: dict[str, float] = {}
        self.collected: Sequence[Experience] = ()
        self.collected_at = 0
        self._state: dict[str, Any] | None = None

    @property
    def student(self) -> Scorer:
        """The scorer that the trainer trains."""
        assert self.trainer is not None
        return scorer_of(self.trainer.lightning_module.student)  # type: ignore[arg-type]

    @property
    def world(self) -> World:
        """This process among the trainer's."""
        assert self.trainer is not None
        return world_of(self.trainer)

    def precision(self) -> AbstractContextManager[None]:
        """The precision that the learning half computes in, for the collecting half too."""
        assert self.trainer is not None
        return self.trainer.precision_plugin.forward_context()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Make the block's tokens count for all ranks: a run's tokens are those of all its processes."""
        tokens = self.collector.clock.tokens
        phases = ("generate", "score", "evaluate")
        before = [tokens[phase] for phase in phases]
        yield
        counts = [tokens[phase] - count for phase, count in zip(phases, before, strict=True)]
        for phase, count, total in zip(phases, before, self.totals(counts), strict=True):
            tokens[phase] = count + total

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Return each count summed over the ranks."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        return [int(n) for n in self.world.total(torch.tensor(counts, device=device)).tolist()]

    def setup(self, stage: str) -> None:
        """Refuse a world that the prompts cannot be divided over, and bring the teacher to this device.

        Where micro-batches have a budget of tokens, the trainer's ``accumulate_grad_batches`` becomes their
        count, and with it an evaluation interval in batches, which were optimizer steps before.
        """
        assert self.trainer is not None
        self.collector.check_world(self.trainer.world_size)
        self._accumulate(self.collector.micro_batches(self.trainer.world_size))
        if self.collector.meter is not None and self.peak_tflops is None:
            self.peak_tflops = self._measured_peak()
        for model in (self.collector.teacher, self.collector.reference):
            if isinstance(model, Movable):
                model.to(self.trainer.strategy.root_device)

    def _accumulate(self, count: int | None) -> None:
        trainer = self.trainer
        assert trainer is not None
        if count is None or trainer.accumulate_grad_batches == count:
            return
        check_one_count(trainer.accumulate_grad_batches, self.collector.micro_batch_tokens)
        trainer.accumulate_grad_batches = count
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= count

    def _measured_peak(self) -> float:
        assert self.trainer is not None
        lower = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        dtype = lower.get(str(self.trainer.precision), next(self.student.parameters()).dtype)
        peak = measured_peak(self.trainer.strategy.root_device, dtype)
        if self.trainer.is_global_zero:
            name = str(dtype).removeprefix("torch.")
            log.info("utilisation is of %.3g TFLOP/s: the fastest matrix product here in %s", peak, name)
        return peak

    def train_dataloader(self) -> ExperienceLoader:
        """Return the loader of experience."""
        return ExperienceLoader(self)

    def val_dataloader(self) -> list[GradedLoader]:
        """Return a loader of graded responses for each way of answering."""
        if self.validation is None:
            return []
        return [self._graded_loader(self.validation, *mode) for mode in self.evaluation.modes()]

    def _graded_loader(self, prompts: Prompts, sampling: Sampling, samples: int) -> GradedLoader:
        def answer(rows: Sequence[int]) -> Graded:
            # Gathered for each batch: Lightning does not run a loader to its end, where a block around all would close.
            student = self.student
            drawing = self.collector.drawing(student, self.trainer.global_step)  # type: ignore[union-attr]
            with self.counting(), self.precision(), unsharded(student), drawing:
                answers = self.collector.evaluate(
                    student, prompts, rows, sampling, samples, max(len(rows), 1)
                )
                return next(answers, NO_ANSWER)

        settings = self.evaluation
        count = len(prompts) if settings.problems is None else min(settings.problems, len(prompts))
        return GradedLoader(count, settings.batch, self.world, answer)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step takes from this half: experience not learned from yet, draws, counts.

        Of all processes; complete on the first, which writes it.
        """
        assert self.trainer is not None
        step, clock = self.trainer.global_step, self.collector.clock
        # Text that was written ahead is older than these weights, which could not write it again.
        # A run that an exception ends does not wait for an engine that may be gone.
        ahead = self.collector.ahead.pending(_LAST_SECONDS if self.trainer.interrupted else None)
        own = {
            "steps": [packed(part) for part in self.remaining(step)],
            "ahead": None if ahead is None else [ahead[0], packed(ahead[1])],
            "random": randomness.captured(),
        }
        return {
            "step": step,
            "processes": gathered_objects(self.trainer, own),
            "metrics": dict(self.metrics),
            "clock": clock.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's state, when training begins."""
        self._state = state_dict
        self.metrics = dict(state_dict["metrics"])
        self.collector.clock.load_state_dict(state_dict["clock"])

    def remaining(self, step: int) -> Sequence[Experience]:
        """Return the last collection's optimizer steps that are still to be taken after ``step`` of them all."""
        return self.collected[max(step - self.collected_at, 0) :]

    def take_restored(self, step: int) -> bool:
        """Put back what a checkpoint holds for the next optimizer step, once; return whether it holds any."""
        state, self._state = self._state, None
        if state is None or state["step"] != step:
            return False
        world, processes = self.world, state["processes"]
        if len(processes) == world.size:
            randomness.restore(processes[world.rank]["random"])
        terms, device = self.collector.objective.needs.collected_full, self.student.device
        ahead = [process["ahead"] for process in processes if process["ahead"] is not None]
        if len(ahead) == len(processes):
            written = [unpacked_rollout(rollout) for _, rollout in ahead]
            self.collector.ahead.restore(ahead[0][0], shared_out(written, world.rank, world.size).to(device))
        self.collected_at = step
        self.collected = [
            shared_out([unpacked(part, terms) for part in parts], world.rank, world.size).to(device)
            for parts in zip(*(process["steps"] for process in processes), strict=True)
        ]
        return bool(self.collected)

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics of the last collection, once."""
        metrics, self.metrics = self.metrics, {}
        return metrics


class ExperienceLoader:
    """Yields ``max_steps * accumulate_grad_batches`` micro-batches, collecting whenever it runs dry."""

    def __init__(self, data: OnPolicyData) -> None:
        self.data = data

    def __len__(self) -> int:
        trainer = self.data.trainer
        assert trainer is not None
        return int(trainer.max_steps * trainer.accumulate_grad_batches)

    def __iter__(self) -> Iterator[Experience]:
        data, trainer = self.data, self.data.trainer
        assert trainer is not None
        clock, per_collection = data.collector.clock, data.collector.steps_per_collection
        while trainer.global_step < trainer.max_steps:
            done = trainer.global_step
            if not data.take_restored(done):
                # From within a collection only where a checkpoint has none of it: that of another program.
                data.collected = self._collect(done // per_collection, done)[done % per_collection :]
                data.collected_at = done
            for step in data.collected:
                if trainer.global_step >= trainer.max_steps:
                    return
                cut = micro_batches(step, trainer.accumulate_grad_batches)
                counts = data.totals([int((micro_batch.share > 0).sum()) for micro_batch in cut])
                for micro_batch, count in zip(cut, counts, strict=True):
                    clock.tokens["train"] += count
                    clock.switch("train")
                    yield micro_batch
                    clock.switch(None)

    def _collect(self, collection: int, done: int) -> list[Experience]:
        data, trainer = self.data, self.data.trainer
        assert trainer is not None
        student = data.student
        following = (collection + 1) * data.collector.steps_per_collection
        training = student.training
        student.eval()
        try:
            with data.counting(), data.precision(), unsharded(student):
                steps, report = data.collector.collect(
                    student,
                    collection,
                    progress=done / trainer.max_steps,
                    version=done,
                    world=data.world,
                    upcoming=following / trainer.max_steps if following < trainer.max_steps else None,
                )
        finally:
            student.train(training)
        data.report = report
        means = report.means(data.world.total, torch.device(trainer.strategy.root_device))
        data.metrics = means | data.collector.clock.lap(data.peak_tflops)
        return steps
