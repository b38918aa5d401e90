"""Our side of the comparison of whole steps: put together as a Python user does, timed by the run's own clock."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning as L
import torch
from steps import ADAM, CLIP, RATE, Job, K, Meter

from opd_lightning.assemble import CollectorSettings, Run, assemble
from opd_lightning.clock import PhaseClock
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.estimator.topk import TopK
from opd_lightning.evaluation import Evaluation
from opd_lightning.objective import Objective
from opd_lightning.protocols import Support
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.support.full import Full
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.task.jsonl import Jsonl
from opd_lightning.teacher.local import LocalTeacher
from opd_lightning.types import Experience


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """Draw from the model's own distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


def objective(kind: str, k: int = K) -> Objective:
    """Return the reverse KL of ``kind``: default (teacher's top k), tail (student's top k and the rest), full."""
    supports: dict[str, Support] = {
        "default": TeacherTopK(k=k),
        "tail": StudentTopK(k=k),
        "full": Full(),
    }
    form = "tail" if kind == "tail" else "renormalised"
    return Objective(
        estimator=TopK(divergence=ReverseKL(), form=form), support=supports[kind], reduction=TokenMean()
    )


def assembled(kind: str, job: Job, k: int = K) -> Run:
    """Return a run of ``kind``; its collector is the default's, scaled from 64 responses to the batch."""
    plain = asdict(_Plain())
    return assemble(
        student_path=job.student,
        teacher=LocalTeacher(path=job.teacher, dtype="float32"),
        task=Jsonl(path=str(job.prompts)),
        engine=TransformersEngine(),
        rollout=StudentRollout(
            samples=1, max_new_tokens=job.response, loss_horizon=None, early_stop=False, **plain
        ),
        objective=objective(kind, k),
        collector=CollectorSettings(
            prompts_per_collection=job.batch,
            steps_per_collection=1,
            score_rows=32,
            probe_rows=job.batch // 4,
            max_prompt_tokens=512,
            long_prompts="refuse",
        ),
        evaluation=Evaluation(problems=1, max_new_tokens=1, samples=0, batch=1, **plain),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=RATE, fused=True, **ADAM),
        scheduler=None,
    )


class CpuClock(PhaseClock):
    """Charges CPU seconds to each phase beside wall seconds, in ``cpu``."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu: dict[str, float] = defaultdict(float)
        self._cpu_since = 0.0

    def switch(self, phase: str | None) -> str | None:
        """Begin ``phase`` (None: none), end the one before and return it."""
        now = time.process_time()
        if self.phase is not None:
            self.cpu[self.phase] += now - self._cpu_since
        self._cpu_since = now
        return super().switch(phase)


class _Laps(L.Callback):
    """Ends a lap of the meter with each optimizer step."""

    def __init__(self, run: Run, job: Job, meter: Meter) -> None:
        self.run, self.job, self.meter, self.clock = run, job, meter, CpuClock()
        run.data.collector = replace(run.data.collector, clock=self.clock)
        self.first: Experience | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.meter.start(self.job, [module.student.model, self.run.teacher.scorer.model])

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, *args: Any) -> None:
        self.first = self.first or batch

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.clock.switch("optimizer")  # clipping included

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.clock.switch(None)
        spent = self.clock.cpu
        self.meter.seconds |= {
            "generate": spent["generate"],
            "score": spent["score"] + spent["probe"],
            "learn": spent["train"],
            "optimizer": spent["optimizer"],
        }
        self.meter.lap()
        self.meter.losses.append(float(trainer.callback_metrics["train/loss"]))


def train(kind: str, job: Job, k: int = K) -> tuple[dict[str, Any], Experience]:
    """Train ``job.steps`` steps; return the meter's result and the first step's experience."""
    run, meter = assembled(kind, job, k), Meter()
    laps = _Laps(run, job, meter)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=job.steps,
        gradient_clip_val=CLIP,
        logger=False,
        callbacks=[laps],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(run.module, run.data)
    assert laps.first is not None
    return meter.result(), laps.first
