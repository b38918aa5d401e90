"""A vLLM server on loopback: the same checks as the engine in this process, and a run that learns from it."""

import copy
import csv
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch
from vllm_servers import STUDENT_FLAGS, free_port, vllm_serving

from opd_lightning.engine import vllm_server
from opd_lightning.engine.gloo import GlooGroup
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.engine.vllm_http import Server
from opd_lightning.engine.vllm_sending import Source
from opd_lightning.engine.vllm_server import VllmServerEngine
from opd_lightning.engine.vllm_transfer import Transfer
from opd_lightning.errors import ConfigError
from opd_lightning.models import load_model

from .conftest import ragged
from .test_vllm_engine import FREE, GREEDY, STUDENT, change, teacher_forced

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def student():
    return load_model(STUDENT, "student.path").eval()


class Serving:
    """The module's server, which takes weights from a folder and by gloo, and may be started again."""

    def __init__(self, student, folder):
        self.folder, self.port, self.stack = folder, free_port(), ExitStack()
        self.address = f"http://127.0.0.1:{self.port}"
        VllmServerEngine(**self.settings("folder")).write(student)

    def settings(self, transfer):
        """Nothing is written where weights are sent."""
        folder = str(self.folder) if transfer == "folder" else None
        return {"url": self.address, "folder": folder, "transfer": transfer, "head_dim": 32}

    def start(self):
        flags = (*STUDENT_FLAGS, "--weight-transfer-config", '{"backend": "opd_gloo"}')
        served = vllm_serving(self.folder, self.port, *flags, log=self.folder / "server.log")
        self.leader = self.stack.enter_context(served)

    def version(self):
        return Server(url=self.address, timeout_s=60, retries=0, in_flight=1).version()


@pytest.fixture(scope="module")
def serving(student, tmp_path_factory):
    if "opd_lightning" not in {point.name for point in entry_points(group="vllm.general_plugins")}:
        pytest.fail("the package was installed without its entry point: pip install --no-deps -e .")
    serving = Serving(student, tmp_path_factory.mktemp("served"))
    with serving.stack:
        serving.start()
        yield serving


@pytest.fixture(scope="module", params=["folder", "gloo"])
def settings(request, serving):
    return serving.settings(request.param)


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


def shapes_anew(engine):
    """Have the engine look up once more which weights there are, as a new run does."""
    if engine._held.transfer is not None:
        engine._held.transfer.forget()


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
        skipped.setattr(Transfer, "bring", lambda *_: None)
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
        whole = vllm_server.weights_of
        without = lambda model: ((n, w) for n, w in whole(model) if n != "lm_head.weight")  # noqa: E731
        half.setattr(vllm_server, "weights_of", without)
        shapes_anew(engine)
        with pytest.raises(ConfigError, match=r"a stale head; the \d+ tensors .* are as they were sent"):
            engine.generate(student, prompts, FREE)
    change(student, seed=5)
    with monkeypatch.context() as less:
        save, of, left = vllm_server.save_file, Source.of, "model.layers.1.input_layernorm.weight"

        def fewer(sent, *more, **named):
            save({name: weight for name, weight in sent.items() if name != left}, *more, **named)

        less.setattr(vllm_server, "save_file", fewer)
        less.setattr(Source, "of", lambda all: of(lambda: ((n, w) for n, w in all() if n != left)))
        shapes_anew(engine)
        with pytest.raises(ConfigError, match=rf"of \d+ tensors .* 1 differ: {left}\)"):
            engine.generate(student, prompts, FREE)
    shapes_anew(engine)
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


def test_a_sending_that_ends_in_the_middle_leaves_nothing_behind(serving, student, prompts, monkeypatch):
    """Of vLLM's own a half loaded layer is left, which takes the next weights for the rest of the old ones."""
    real, engine = GlooGroup.send, VllmServerEngine(**serving.settings("gloo"), timeout_s=60)
    for after in (1, 5, 9):
        sent = []

        def fewer(group, weight, after=after, sent=sent):
            sent.append(weight)
            if len(sent) > after:
                raise MemoryError
            real(group, weight)

        change(student, seed=after)
        with monkeypatch.context() as ends:
            ends.setattr(GlooGroup, "send", fewer)
            with pytest.raises(MemoryError):
                engine.generate(student, prompts, FREE)
        assert teacher_forced(student, prompts, engine.generate(student, prompts, FREE)) < 1e-3
        assert teacher_forced(student, prompts, another(serving).generate(student, prompts, FREE)) < 1e-3


def another(serving):
    """The engine of a new run."""
    return VllmServerEngine(**serving.settings("gloo"))


def trained(settings, folder, *more, meanwhile=lambda: None):
    """The numbers of each optimizer step of a run; ``meanwhile`` is called as it begins."""
    overrides = [f"engine.{name}={'null' if value is None else value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "opd_lightning.train", "engine=vllm_server", *overrides, *more]
    command += [
        *("trainer.max_steps=6", "scheduler.warmup_steps=0", "evaluation.every_steps=null"),
        *("evaluation.settings.problems=8", "evaluation.settings.samples=0", "evaluation.teacher=false"),
        *("trainer.enable_progress_bar=false", "rollout.max_new_tokens=64"),
        "collector.max_prompt_tokens=128",  # the server holds 512 tokens a row
        f"hydra.run.dir={folder / 'run'}",
    ]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=variables)
        try:
            meanwhile()
            code = run.wait(800)
        finally:
            run.kill()
    assert code == 0, (folder / "log").read_text()[-3000:]
    assert "accuracy_after" in json.loads((folder / "run" / "summary.json").read_text())
    with (folder / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(rows) == 6
    return rows


def results(rows):
    """What does not depend on the clock."""
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def by_folder(serving, tmp_path_factory):
    return trained(serving.settings("folder"), tmp_path_factory.mktemp("by_folder"), "regularizer=[]")


def test_a_run_learns_from_it(by_folder):
    losses = [float(row["train/loss"]) for row in by_folder]
    assert losses[-1] < losses[0]


def test_one_that_is_sent_by_gloo_is_the_same(by_folder, serving, tmp_path):
    rows = trained(serving.settings("gloo"), tmp_path, "regularizer=[]")
    assert results(rows) == results(by_folder)


@pytest.mark.parametrize("transfer", ["folder", "gloo"])
def test_one_ahead_learns_too(transfer, serving, tmp_path):
    rows = trained(serving.settings(transfer), tmp_path, "engine.ahead=1", "regularizer=[importance]")
    losses = [float(row["train/loss"]) for row in rows]
    assert losses[-1] < losses[0]
    behind = [float(row["rollout/versions_behind"]) for row in rows if row.get("rollout/versions_behind")]
    assert set(behind) == {0, 4}  # two collections of four optimizer steps


def test_one_whose_server_is_started_again_is_the_same(by_folder, serving, tmp_path):
    def start_again():
        until = time.monotonic() + 300
        while not (version := serving.version()).endswith("-2") or version == before:
            assert time.monotonic() < until
            time.sleep(0.01)
        serving.stack.close()
        serving.start()

    before = serving.version()
    more = ("regularizer=[]", "engine.retries=8")
    rows = trained(serving.settings("gloo"), tmp_path, *more, meanwhile=start_again)
    assert results(rows) == results(by_folder)
