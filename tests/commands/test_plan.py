"""``python -m opd_lightning.plan``: the cost of a run from shapes alone."""

from __future__ import annotations

import re

import pytest

from commands.running import here

KNOWN = "planning.cpu_tflops=0.1"


def test_a_plan_reads_no_weight_and_leaves_no_folder(tmp_path, models_stay_closed):
    folder = tmp_path / "runs" / "day" / "time"
    done = here("plan", KNOWN, folder=folder)
    assert done.code == 0, done.err
    for part in ("student weights", "gradients", "optimizer state", "activations", "key-value cache"):
        assert part in done.out
    assert "An estimate" in done.out
    assert "0.1 TFLOP/s" in done.out
    assert "(collector.max_prompt_tokens, the bound)" in done.out
    assert not (tmp_path / "runs" / "day").exists()


def test_a_thousand_gpus(tmp_path, models_stay_closed):
    batch = ["collector.prompts_per_collection=4096", "strategy=fsdp"]
    done = here("plan", "trainer=gpu", "trainer.devices=8", "trainer.num_nodes=128", *batch, folder=tmp_path)
    assert done.code == 0, done.err
    assert "processes  1024 on 128 nodes, strategy fsdp" in done.out
    rows = re.findall(r"^ +(\d+) +([\d.]+) [GM]B +[\d.]+ \w+$", done.out, re.MULTILINE)
    assert [int(n) for n, _ in rows] == [2**i for i in range(11)]
    assert float(rows[-1][1]) > 700
    assert "student weights           0.0 MB" in done.out  # 1.2 MB over 1,024 processes


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["student.path=/nowhere"], "`student.path` must be a folder with a model"),
        (["teacher.path=/nowhere"], "`teacher.path` must be a folder with a model"),
        (["trainer.devices=3"], "a multiple of 3 prompts"),
        (["planning.response_share=2"], "`planning.response_share` must be in (0, 1], got 2"),
        (["planning.nonsense=2"], "nonsense"),
        (["planning.utilisation.train=0"], "`planning.utilisation.train` must be in (0, 1], got 0"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(tmp_path, overrides, sentence):
    assert sentence in here("plan", KNOWN, *overrides, folder=tmp_path).sentence


def test_a_run_says_what_it_will_cost(tmp_path):
    done = here("train", "debug=fast", "evaluation.teacher=false", folder=tmp_path)
    assert done.code == 0, done.err
    # 2 steps of 4 responses of at most 24 tokens.
    (line,) = re.findall(r"^cost +memory about (.*)$", done.out, re.MULTILINE)
    assert line.endswith("a process, an estimate; at most 192 response tokens trained")
