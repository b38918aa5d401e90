"""``python -m opd_lightning.train`` by two processes, with DDP and with FSDP2, against one process.

The same responses are generated, since each draws from its own seed; what is computed on them is equal to
rounding: metrics to 2e-5, the update of all weights to 1e-4 of its norm (found: 7e-6).
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.paths import model_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STUDENT, TEACHER = (Path(model_path(f"builtin:word_problems/{role}")) for role in ("student", "teacher"))
STEPS, ROWS = 4, 8
# Two collections of two optimizer steps of two micro-batches. The evaluation after step 3 falls into a
# collection and inside the fit, the one after step 4 outside of it; seven problems in batches of three are
# two batches for the first process, and one and nothing for the second.
SHORT = [
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate_grad_batches=2",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    f"collector.prompts_per_collection={ROWS}",
    "collector.steps_per_collection=2",
    "collector.probe_rows=99",
    "rollout.samples=1",
    "rollout.max_new_tokens=100",
    "scheduler.warmup_steps=0",
    "evaluation.every_steps=3",
    "evaluation.settings.problems=7",
    "evaluation.settings.batch=3",
    "callbacks.samples.every_steps=1",
    "callbacks.samples.count=99",
]
CLIP = 0.05
SGD = [
    "optimizer._target_=torch.optim.SGD",
    "~optimizer.betas",
    "optimizer.lr=1",
    f"trainer.gradient_clip_val={CLIP}",
]
# Two rows a process in three micro-batches: one of them is empty.
EMPTY = "trainer.accumulate_grad_batches=3"
CASES = {
    "tied-topk": ["estimator=topk"],
    "untied-topk": ["estimator=topk", "evaluation.settings.problems=1", "evaluation.every_steps=null"],
    "tied-token": ["estimator=token", "support=none", *SGD],
    "untied-token": ["estimator=token", EMPTY, *SGD],
    # The second collection is written by the weights of the first, which both processes gather for it.
    "tied-ahead": ["estimator=token", "engine.ahead=1", "regularizer=[importance]", *SGD],
}
PAIRS = [*((case, "fsdp") for case in CASES), ("tied-topk", "ddp"), ("untied-token", "ddp")]


@dataclass(frozen=True)
class Done:
    """A command that ended: exit code, output, and its run folder."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def rows(self) -> dict[int, dict[str, float]]:
        """Metrics by step, seconds and speeds left out."""
        steps: dict[int, dict[str, float]] = {}
        with (self.folder / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                found = {k: float(v) for k, v in row.items() if v and k not in ("step", "epoch")}
                steps.setdefault(int(row["step"]), {}).update(
                    {k: v for k, v in found.items() if not k.startswith("time/")}
                )
        return steps

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "student" / "model.safetensors")

    @property
    def checkpoint(self) -> dict:
        return torch.load(self.folder / "checkpoints" / f"step={STEPS}.ckpt", weights_only=True)


@dataclass(frozen=True)
class Pair:
    """A case by one process, by two, and the student that both began with."""

    one: Done
    two: Done
    student: Path


def train(folder: Path, *overrides: str) -> Done:
    """Run the command in a process group of its own, of which nothing may be left when it ends."""
    command = [sys.executable, "-m", "opd_lightning.train", *SHORT, *overrides, f"hydra.run.dir={folder}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        command,
        env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=500)
        assert alone(process.pid), "a process was left behind"
    finally:
        if process.returncode is None or not alone(process.pid, seconds=0):
            os.killpg(process.pid, signal.SIGKILL)
    return Done(process.returncode, out, err, folder)


def alone(group: int, seconds: float = 20) -> bool:
    """Return whether every process of a group has ended, some seconds after its leader did."""
    end = time.monotonic() + seconds
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """The shipped student with a head of its own, equal to its embedding at first."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    assert model.config.tie_word_embeddings
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(folder)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def students(untied) -> dict[str, Path]:
    return {case: untied if case.startswith("untied") else STUDENT for case in CASES}


@pytest.fixture(scope="module")
def single(students, tmp_path_factory) -> dict[str, Done]:
    """Every case by one process, two of them at a time."""
    root = tmp_path_factory.mktemp("one")
    with ThreadPoolExecutor(2) as pool:
        runs = {
            case: pool.submit(train, root / case, f"student.path={students[case]}", *overrides)
            for case, overrides in CASES.items()
        }
    done = {case: run.result() for case, run in runs.items()}
    for run in done.values():
        assert run.code == 0, run.err
    return done


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request, single, students, tmp_path_factory) -> Pair:
    case, strategy = request.param
    student, overrides = students[case], CASES[case]
    folder = tmp_path_factory.mktemp(strategy) / case
    two = train(folder, f"student.path={student}", *overrides, f"strategy={strategy}", "trainer.devices=2")
    assert two.code == 0, two.err
    return Pair(single[case], two, student)


# numerics 11.23
def test_same_metrics(pair):
    one, two = pair.one, pair.two
    assert one.rows.keys() == two.rows.keys()
    for step, expected in one.rows.items():
        assert two.rows[step] == pytest.approx(expected, rel=2e-5, abs=1e-6), f"step {step}"
    trained = [row for row in one.rows.values() if "train/loss" in row]
    assert len({row["train/loss"] for row in trained}) == STEPS
    assert all(row["train/grad_norm"] > CLIP for row in trained)


def test_same_responses(pair):
    """The first process's share letter by letter, the other's by their number, lengths and grades."""
    one, two = pair.one, pair.two
    assert two.summary["response_tokens"] == one.summary["response_tokens"] > 0
    for name in ("rollout/length", "rollout/eos", "rollout/truncation", "rollout/accuracy", "train/tokens"):
        assert [r[name] for r in one.rows.values() if name in r] == [
            r[name] for r in two.rows.values() if name in r
        ]
    whole, share = transcripts(one), transcripts(two)
    assert [len(part) for part in whole] == [ROWS, ROWS]  # two collections
    # Within an optimizer step the prompts are dealt out in turn; samples are shown in their order.
    assert share == [part[0::2] for part in whole]


def transcripts(run: Done) -> list[list[str]]:
    """Return the samples of each collection, prompts with their responses, in order."""
    events = EventAccumulator(str(run.folder)).Reload().Tensors("rollout/samples/text_summary")
    texts = [event.tensor_proto.string_val[0].decode().split("\n\n---\n\n") for event in events]
    return [text for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]


def test_same_evaluations(pair):
    one, two = pair.one, pair.two
    assert one.summary["evaluations"].keys() == two.summary["evaluations"].keys()
    assert {"0", str(STEPS)} <= one.summary["evaluations"].keys()
    for step, expected in one.summary["evaluations"].items():
        assert two.summary["evaluations"][step] == pytest.approx(expected, abs=1e-6)
    names = ("accuracy_before", "accuracy_after", "teacher_accuracy", "optimizer_steps")
    assert [two.summary[name] for name in names] == [one.summary[name] for name in names]


# numerics 11.23
def test_same_student(pair):
    start, expected, found = load_file(pair.student / "model.safetensors"), pair.one.weights, pair.two.weights
    assert found.keys() == expected.keys() == start.keys()
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(expected[name] - found[name]).flatten() for name in start])
    assert moved.norm() > 1e-2
    assert apart.norm() <= 1e-4 * moved.norm()
    untied = "lm_head.weight" in start
    assert untied == (pair.student != STUDENT)
    if untied:
        assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_the_exported_student_loads(pair):
    two = pair.two
    model, report = AutoModelForCausalLM.from_pretrained(two.folder / "student", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(embedding, two.weights["model.embed_tokens.weight"])
    assert (head is embedding) == ("lm_head.weight" not in two.weights)
    tokenizer = AutoTokenizer.from_pretrained(two.folder / "student")
    assert tokenizer("3 + 4")["input_ids"] == AutoTokenizer.from_pretrained(STUDENT)("3 + 4")["input_ids"]


# numerics 11.31
def test_the_checkpoint_is_the_student_whole_and_alone(pair):
    one, two = pair.one, pair.two
    expected, found = one.checkpoint, two.checkpoint
    assert found["global_step"] == STEPS
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in two.weights.items():
        assert torch.equal(found["state_dict"][f"student.model.{name}"], tensor)
    states = [c["optimizer_states"][0]["state"] for c in (expected, found)]
    for mine, theirs in zip(*([tensors(s) for s in states]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-3)
    taught = load_file(TEACHER / "model.safetensors").values()
    for tensor in tensors(found):
        assert type(tensor) is torch.Tensor
        assert not any(t.shape == tensor.shape and torch.equal(t, tensor) for t in taught if t.std() > 0)


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return (
        [t for item in value for t in tensors(item)]
        if not isinstance(value, str | int | float | None)
        else []
    )


def test_one_process_speaks(pair):
    one, two = pair.one, pair.two
    names = [
        sorted(f"{p.relative_to(r.folder)}" for p in r.folder.rglob("*") if p.is_file()) for r in (one, two)
    ]
    plain = [[n for n in files if not n.startswith("events.")] for files in names]
    assert plain[0] == plain[1]
    assert len(names[0]) == len(names[1])
    assert two.out.count("greedy accuracy") == 1
    assert two.out.count("step 0:") == 1
    assert "Traceback" not in two.err
    assert "sync_dist" not in two.err


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_prompts_that_cannot_be_shared_are_refused(strategy, tmp_path):
    """One sentence, before a second process starts."""
    done = train(
        tmp_path / "run", f"strategy={strategy}", "trainer.devices=2", "collector.prompts_per_collection=6"
    )
    assert done.code == 2
    sentence = "error: `collector.prompts_per_collection` must give each optimizer step a multiple of 2"
    assert done.err.count(sentence) == 1
    assert "use 8" in done.err
    assert "Traceback" not in done.out + done.err
    assert not (tmp_path / "run" / "summary.json").exists()
