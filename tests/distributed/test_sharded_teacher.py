"""``teacher.shard=true`` by two processes: the run is the same, and each process holds half of the teacher."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from distributed.test_two_processes import TEACHER, tensors, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Three collections of one optimizer step; a process has 3 rows of each, in forwards of 2 and 1.
RUN = [
    "trainer.max_steps=3",
    "trainer.accumulate_grad_batches=1",
    "trainer.devices=2",
    "collector.prompts_per_collection=6",
    "collector.steps_per_collection=1",
    "collector.score_rows=2",
    "rollout.max_new_tokens=40",
    "evaluation.settings.problems=2",
    "evaluation.settings.samples=0",
    "evaluation.every_steps=2",
    "evaluation.settings.max_new_tokens=20",
    "callbacks.samples.count=0",
]

HOLDS = """
import faulthandler, json, sys, torch, torch.distributed as dist
from dataclasses import replace
from tiny import random_experience, tiny_model
from opd_lightning import layout
from opd_lightning.scorer import Scorer
from opd_lightning.teacher.sharded import ShardedScorer
from opd_lightning.types import Want

faulthandler.dump_traceback_later(400, exit=True)  # a process that waits for the other says where
layout.CALL_WORK["cpu"] = 0.0  # as many calls of a whole model as there are lengths of rows
rank, store, tied, dtype = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "tied", getattr(torch, sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
whole, scorer = (Scorer(tiny_model(tied=tied).to(dtype)).eval().requires_grad_(False) for _ in range(2))
teacher = ShardedScorer(scorer).to("cpu")
held = [sum(p.to_local().numel() for p in scorer.parameters())]
# Other rows and lengths on each process, and then nothing to score on the second.
some = random_experience(5 + rank).rollout.tokens
none = replace(some, mask=torch.zeros_like(some.mask)) if rank else some
apart = 0.0
for tokens in (some, none, some):
    found, expected = (s(tokens, Want(taken=True, entropy=True)) for s in (teacher, whole))
    apart = max(apart, (found.taken_logp - expected.taken_logp).abs().max().item())
    held.append(sum(p.to_local().numel() for p in teacher.to("cpu").scorer.parameters()))
print(json.dumps({"all": sum(p.numel() for p in whole.parameters()), "held": held, "apart": apart}))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_run_is_that_of_a_whole_teacher(strategy, tmp_path):
    whole = train(tmp_path / "whole", *RUN, f"strategy={strategy}")
    shard = train(tmp_path / "shard", *RUN, f"strategy={strategy}", "teacher.shard=true")
    assert whole.code == shard.code == 0, whole.err + shard.err
    assert shard.rows.keys() == whole.rows.keys()
    for step, expected in whole.rows.items():
        found = {k: v for k, v in shard.rows[step].items() if not k.startswith("throughput/")}
        assert found == pytest.approx(
            {k: v for k, v in expected.items() if not k.startswith("throughput/")}, rel=1e-5, abs=1e-6
        )
    for name, expected in whole.weights.items():
        torch.testing.assert_close(shard.weights[name], expected, atol=1e-6, rtol=1e-4)
    assert "sharded over 2 processes" in shard.out
    assert "sharded over" not in whole.out
    # One process asks for it after the run, and the other is gone.
    assert whole.summary["teacher_accuracy"] is not None
    assert shard.summary["teacher_accuracy"] is None
    assert "teacher_accuracy is left out: the teacher is sharded" in shard.out + shard.err
    last = torch.load(shard.folder / "checkpoints" / "step=3.ckpt", weights_only=True)
    taught = [t for t in load_file(TEACHER / "model.safetensors").values() if t.std() > 0]
    for tensor in tensors(last):
        assert type(tensor) is torch.Tensor
        assert not any(t.shape == tensor.shape and torch.equal(t, tensor) for t in taught)


@pytest.mark.parametrize(
    ("head", "dtype"), [("tied", "float32"), ("untied", "float32"), ("tied", "bfloat16")]
)
def test_each_process_holds_half_between_its_forwards(head, dtype, tmp_path):
    paths = os.pathsep.join(path for path in sys.path if path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(rank), str(tmp_path / "store"), head, dtype],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    # 5 s on an idle machine, and 48 s on one with seven times the work for its cores.
    try:
        done = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, done, strict=True):
        assert process.returncode == 0, err
    for found in (json.loads(out.splitlines()[-1]) for out, _ in done):
        assert found["apart"] <= 1e-5
        assert all(0.45 <= held / found["all"] <= 0.55 for held in found["held"]), found
