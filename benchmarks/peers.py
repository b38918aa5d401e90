"""trl's side of the comparison of whole steps (trl 1.16.0; pip install 'opd-lightning[parity]').

Its phases are seen by wrapping its calls. The values that it logs are left on, as ours are.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from steps import CLIP, RATE, Job, K, Meter
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

from opd_lightning.types import Experience


def settings(job: Job, folder: str) -> dict[str, Any]:
    """Return what all of trl's trainers are told. The optimizer is their default."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,  # it would switch off the key-value cache of GKD's generation
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": job.steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": CLIP,
        "optim": "adamw_torch_fused",
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }


def stable(job: Job, folder: str, **models: Any) -> DistillationTrainer:
    """Return the stable trainer: the whole vocabulary, in tiles."""
    config = DistillationConfig(
        **settings(job, folder),
        max_completion_length=job.response,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=1.0,
        disable_dropout=True,
        shuffle_dataset=False,
    )
    return DistillationTrainer(
        args=config, train_dataset=Dataset.from_dict({"prompt": job.texts()}), **models
    )


def _chats(job: Job) -> Dataset:
    # The assistant's text is not trained on where the student writes its own.
    rows = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[:1]}]
        for text in job.texts()
    ]
    return Dataset.from_dict({"messages": rows})


def gkd(job: Job, folder: str, **models: Any) -> GKDTrainer:
    """Return the trainer with dense logits that most people run."""
    config = GKDConfig(
        **settings(job, folder),
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=job.response,
        max_length=job.prompt + job.response,
    )
    return GKDTrainer(args=config, train_dataset=_chats(job), **models)


def iw_opd(job: Job, folder: str, **models: Any) -> IWOPDTrainer:
    """Return the only trainer with a top-k and a teacher in this process: the student's top 16 and the tail."""
    config = IWOPDConfig(
        **settings(job, folder),
        distillation_objective="jsd",
        loss_top_k=K,
        loss_add_tail=True,
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_completion_length=job.response,
        max_prompt_length=job.prompt,
        max_length=job.prompt + job.response,
    )
    return IWOPDTrainer(args=config, train_dataset=_chats(job), **models)


Make = Callable[..., Any]


def loaded(job: Job) -> dict[str, Any]:
    """Return the models and the tokenizer under the names of trl's arguments."""

    def model(path: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(job.student, padding_side="left")
    return {
        "model": model(job.student),
        "teacher_model": model(job.teacher),
        "processing_class": tokenizer,
    }


class _Laps(TrainerCallback):
    """Ends a lap of the meter with each optimizer step."""

    def __init__(self, trainer: Any, job: Job, meter: Meter) -> None:
        self.trainer, self.job, self.meter = trainer, job, meter

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.optimizer
        optimizer.step = self.meter.timed("optimizer", optimizer.step)
        self.meter.start(self.job, [self.trainer.model, self.trainer.teacher_model])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.lap()

    def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.meter.losses.append(logs["loss"])


def train(make: Make, job: Job) -> dict[str, Any]:
    """Train ``job.steps`` steps; return the meter's result."""
    meter, models = Meter(), loaded(job)
    student, teacher = models["model"], models["teacher_model"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(job, folder, **models)
        trainer.add_callback(_Laps(trainer, job, meter))
        student.generate = meter.timed("generate", student.generate)
        # The stable trainer calls the teacher's backbone alone, and its head inside the loss.
        called = teacher.base_model if make is stable else teacher
        called.forward = meter.timed("score", called.forward)
        trainer.compute_loss = meter.timed("loss", trainer.compute_loss)
        trainer.training_step = meter.timed("step", trainer.training_step)
        trainer.train()
    for lap in meter.laps:
        phases = defaultdict(float, lap["phases"])
        # Of a step: what is neither generation nor the teacher is the student's forward, loss and backward.
        inside = phases["loss"] - phases["score"]
        backward = phases["step"] - phases["generate"] - phases["loss"]
        lap["phases"] = {name: phases[name] for name in ("generate", "score", "optimizer")}
        lap["phases"]["learn"] = inside + backward
    return meter.result()


@torch.no_grad()
def first_losses(job: Job, experience: Experience) -> dict[str, float]:
    """Return the loss that each of trl's trainers computes on our responses, with the same weights."""
    rollout = experience.rollout
    prompt_mask, mask = rollout.prompt.mask.long(), rollout.mask.long()
    ids = torch.cat([rollout.prompt.ids, rollout.ids], -1)
    shown = torch.cat([prompt_mask, mask], -1)
    whole = {
        "prompt_ids": rollout.prompt.ids,
        "prompt_mask": prompt_mask,
        "completion_ids": rollout.ids,
        "completion_mask": mask,
        "num_items_in_batch": mask.sum(),
    }
    labels = ids.masked_fill(torch.cat([prompt_mask * 0, mask], -1) == 0, -100)
    dense = {"input_ids": ids, "attention_mask": shown, "labels": labels}
    losses = {}
    for make, inputs in ((stable, whole), (gkd, dense)):
        models = loaded(job)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(job, folder, **models)
            losses[make.__name__] = float(trainer.compute_loss(models["model"].train(), inputs))
    return losses
