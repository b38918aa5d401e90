"""A loss that is not finite on one process of two skips the step on both."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POISON = """
import lightning as L

class Poison(L.Callback):
    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == self.rank and batch_idx % 2:
            batch.support_teacher_logp[0, 0] = float("nan")

class Keep(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        import torch
        weights = torch.cat([p.detach().flatten() for p in pl_module.student.parameters()])
        torch.save(weights, f"weights_{trainer.global_step}_{trainer.global_rank}.pt")
"""


def trained(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    (folder / "poison.py").write_text(POISON)
    words = [
        *("debug=fast", "trainer.devices=2", "strategy=ddp", "trainer.max_steps=4"),
        *("trainer.accumulate_grad_batches=2", "collector.steps_per_collection=1"),
        *("collector.prompts_per_collection=8", "evaluation.teacher=false", "evaluation.settings.problems=2"),
        *("+callbacks.poison._target_=poison.Poison", "+callbacks.poison.step=1", "+callbacks.poison.rank=1"),
        *("+callbacks.keep._target_=poison.Keep", f"hydra.run.dir={folder / 'run'}", *overrides),
    ]
    return subprocess.run(
        [sys.executable, "-m", "opd_lightning.train", *words],
        cwd=folder,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )


def test_both_processes_skip_the_step_of_one(tmp_path):
    done = trained(tmp_path)
    assert done.returncode == 0, done.stderr
    weights = {
        (step, rank): torch.load(tmp_path / f"weights_{step}_{rank}.pt")
        for step in (1, 2, 3, 4)
        for rank in (0, 1)
    }
    for step in (1, 2, 3, 4):
        assert torch.equal(weights[step, 0], weights[step, 1])
    assert torch.equal(weights[1, 0], weights[2, 0])
    assert not torch.equal(weights[2, 0], weights[3, 0])
    with (tmp_path / "run" / "metrics.csv").open() as file:
        counts = [float(r["train/skipped_steps"]) for r in csv.DictReader(file) if r["train/skipped_steps"]]
    assert counts == [0, 1, 1, 1]
    assert [path.name for path in (tmp_path / "run" / "nonfinite").iterdir()] == ["step_1_rank1.jsonl"]


def test_at_the_limit_both_leave_with_a_sentence_and_a_checkpoint(tmp_path):
    done = trained(tmp_path, "callbacks.guard.limit=1")
    assert done.returncode == 2, done.stderr
    assert "error: `callbacks.guard.limit` must not be reached, got 1 optimizer steps" in done.stderr
    assert "Traceback" not in done.stderr
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    checkpoint = torch.load(saved, weights_only=False)
    assert checkpoint["global_step"] == 2
    assert all(bool(v.isfinite().all()) for v in checkpoint["state_dict"].values())
