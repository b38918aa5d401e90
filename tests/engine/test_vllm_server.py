"""A vLLM server on loopback: the same checks as the engine in this process, and a run that learns from it."""

import copy
import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from vllm_servers import STUDENT_FLAGS, free_port, vllm_serving

from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.engine.vllm_http import Server
from opd_lightning.engine.vllm_server import VllmServerEngine
from opd_lightning.errors import ConfigError
from opd_lightning.models import load_model

from .conftest import ragged
from .test_vllm_engine import FREE, GREEDY, STUDENT, change, teacher_forced

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def student():
    return load_model(STUDENT, "student.path").eval()


@pytest.fixture(scope="module")
def settings(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    port = free_port()
    settings = {"url": f"http://127.0.0.1:{port}", "folder": str(folder), "head_dim": 32}
    VllmServerEngine(**settings).write(student)
    with vllm_serving(folder, port, *STUDENT_FLAGS, log=folder / "server.log"):
        yield settings


@pytest.fixture(scope="module")
def engine(settings):
    return VllmServerEngine(**settings, check_every=1)


def test_text_log_probs_and_top_ids_are_the_students(engine, student, prompts):
    got = engine.generate(student, prompts, GREEDY)
    want = TransformersEngine().generate(student, prompts, GREEDY)
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.finish, want.finish)
    assert engine._held.gap < 1e-3
    for settings in ({}, {"temperature": 0.7, "top_p": 0.8}, {"vocab": 300}):
        sampling = replace(FREE, **settings)
        got = engine.generate(student, prompts, sampling)
        assert teacher_forced(student, prompts, got, **settings) < 1e-3
        assert torch.equal(got.ids, engine.generate(student, prompts, sampling).ids)
    got = engine.generate(student, prompts, replace(FREE, top_ids=4))
    for row in range(len(prompts)):
        text, prompt = got.ids[row].tolist(), prompts.ids[row][prompts.mask[row]].tolist()
        with torch.no_grad():
            logits = student(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        assert torch.equal(got.top_ids[row], logits.topk(4).indices)


def test_weights_are_followed_and_a_stale_server_is_known(engine, student, monkeypatch):
    held = {name: weight.clone() for name, weight in student.state_dict().items()}
    prompts = ragged((150, 151, 152))
    engine.generate(student, prompts, FREE)
    change(student)
    got = engine.generate(student, prompts, FREE)
    assert teacher_forced(student, prompts, got) < 1e-3
    change(student, seed=2)
    with monkeypatch.context() as skipped:
        skipped.setattr(Server, "reload", lambda *_: None)
        with pytest.raises(ConfigError, match="write with the weights of version"):
            engine.generate(student, prompts, FREE)
    change(student, seed=4)
    with monkeypatch.context() as kept:
        ask = Server.ask
        routes = ("/reset_prefix_cache", "/pause", "/resume")  # a pause empties the cache as well
        left_out = lambda self, path, body=None: None if path.startswith(routes) else ask(self, path, body)  # noqa: E731
        kept.setattr(Server, "ask", left_out)
        with pytest.raises(ConfigError, match=r"log-probs within engine\.tolerance"):
            engine.generate(student, prompts, FREE)
    change(student, seed=3)
    with monkeypatch.context() as half:
        # All but the tied head's own name: the server keeps its packed copy.
        from opd_lightning.engine import vllm_server

        whole = vllm_server.weights_of
        without = lambda model: ((n, w) for n, w in whole(model) if n != "lm_head.weight")  # noqa: E731
        half.setattr(vllm_server, "weights_of", without)
        with pytest.raises(ConfigError, match=r"a stale head; the \d+ tensors .* are as they were sent"):
            engine.generate(student, prompts, FREE)
    change(student, seed=5)
    with monkeypatch.context() as less:
        save, left = vllm_server.save_file, "model.layers.1.input_layernorm.weight"

        def fewer(sent, *more, **named):
            save({name: weight for name, weight in sent.items() if name != left}, *more, **named)

        less.setattr(vllm_server, "save_file", fewer)
        with pytest.raises(ConfigError, match=rf"of \d+ tensors .* 1 differ: {left}\)"):
            engine.generate(student, prompts, FREE)
    with torch.no_grad():
        student.load_state_dict(held)


def test_it_draws_with_what_was_sent_while_the_student_changes(settings, student):
    engine, before = VllmServerEngine(**settings), copy.deepcopy(student)
    prompts = ragged((40, 41, 42))
    engine.follow(student, prompts)
    change(student)
    got = engine.draw(student, prompts, FREE)
    assert teacher_forced(before, prompts, got) < 1e-3
    assert teacher_forced(student, prompts, got) > 1e-2
    assert teacher_forced(student, prompts, engine.generate(student, prompts, FREE)) < 1e-3
    student.load_state_dict(before.state_dict())


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_learns_from_it(settings, tmp_path, ahead):
    overrides = [f"engine.{name}={value}" for name, value in settings.items()]
    overrides += [f"engine.ahead={ahead}", f"regularizer=[{'importance' if ahead else ''}]"]
    command = [sys.executable, "-m", "opd_lightning.train", "engine=vllm_server", *overrides]
    short = [
        *("trainer.max_steps=6", "scheduler.warmup_steps=0", "evaluation.every_steps=null"),
        *("evaluation.settings.problems=8", "evaluation.settings.samples=0", "evaluation.teacher=false"),
        *(
            "trainer.enable_progress_bar=false",
            "rollout.max_new_tokens=64",
            "collector.max_prompt_tokens=128",  # the server holds 512 tokens a row
            f"hydra.run.dir={tmp_path / 'run'}",
        ),
    ]
    done = subprocess.run(
        [*command, *short],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy_after" in json.loads((tmp_path / "run" / "summary.json").read_text())
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    losses = [float(row["train/loss"]) for row in rows]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    behind = [float(row["rollout/versions_behind"]) for row in rows if row.get("rollout/versions_behind")]
    assert set(behind) == ({0, 4} if ahead else set())  # two collections of four optimizer steps
