"""Both halves of a run compute in the trainer's precision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import lightning as L
import pytest
import torch
from test_trainer import Toy

from opd_lightning.engine.transformers import TransformersEngine


@dataclass(frozen=True)
class Watched:
    """The engine, and whether products were in low precision when it was called."""

    engine: TransformersEngine
    seen: list[bool] = field(default_factory=list)

    def generate(self, model, prompts, sampling):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return self.engine.generate(model, prompts, sampling)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_generation_has_the_precision_of_training(precision):
    toy = Toy()
    engine = Watched(toy.data.collector.engine)
    toy.data.collector = replace(toy.data.collector, engine=engine)
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(toy.module, datamodule=toy.data)
    assert len(engine.seen) > 2  # two collections, and an evaluation
    assert set(engine.seen) == {precision == "bf16-mixed"}
    assert all(torch.isfinite(p).all() for p in toy.student.parameters())
