"""``serve_teacher`` and ``teacher=served`` as commands: equal losses, a server that goes away, what is refused."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from serving.servers import free_port

from commands.running import Finished, end, here, losses, start
from commands.test_refusals import refusal

SMALL = ["debug=fast", "logger=[csv]", "callbacks=[]", "evaluation.teacher=false", "trainer.max_steps=4"]


@contextlib.contextmanager
def server(cwd: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run ``serve_teacher`` in a process of its own; yield its address, and kill it if it still runs."""
    process = start("serve_teacher", *arguments, cwd=cwd)
    try:
        assert process.stdout is not None
        said = ""
        while "serving at " not in said:
            said = process.stdout.readline()
            assert said, process.stderr.read() if process.stderr else ""
        yield said.split("serving at ")[1].split()[0], process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with server(tmp_path_factory.mktemp("server"), "port=0") as (address, _):
        yield address


def run(folder: Path, *arguments: str) -> Finished:
    done = here("train", *SMALL, *arguments, folder=folder)
    assert done.code == 0, done.err
    return done


def columns(folder: Path) -> list[str]:
    """Everything that was logged but for what the clock says."""
    head, *rows = (line.split(",") for line in (folder / "metrics.csv").read_text().splitlines())
    kept = [i for i, name in enumerate(head) if not name.startswith(("time/", "throughput/"))]
    assert len(kept) > 20
    return [",".join(row[i] for i in kept) for row in [head, *rows]]


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(["support=student"], id="student"),
        pytest.param(["support=augmented"], id="augmented", marks=pytest.mark.slow),
        pytest.param(["support=union"], id="union", marks=pytest.mark.slow),
        pytest.param(["support=teacher"], id="teacher", marks=pytest.mark.slow),
        pytest.param(["support=student", "estimator.form=tail"], id="tail", marks=pytest.mark.slow),
        pytest.param(["estimator=discounted"], id="discounted", marks=pytest.mark.slow),
        pytest.param(
            ["support=student", "student.scoring_temperature=0.7"], id="tau", marks=pytest.mark.slow
        ),
    ],
)
def test_a_served_teacher_gives_the_same_losses(tmp_path, address, objective):
    """Bit by bit: every loss and metric of a run, with the teacher in this process and behind the server."""
    here_, there = tmp_path / "here", tmp_path / "there"
    one = run(here_, *objective)
    other = run(there, *objective, "teacher=served", f"teacher.address={address}")
    assert len(one.losses) == 4
    assert len(set(one.losses)) == 4
    assert other.losses == one.losses
    assert columns(there) == columns(here_)
    assert f"teacher   {address} (served)" in other.out
    assert "HTTP Request" not in other.out + other.err


@pytest.mark.slow
def test_requests_cut_small_give_the_same_losses_to_rounding(tmp_path, address):
    one = run(tmp_path / "one", "support=student")
    other = run(
        tmp_path / "other",
        "support=student",
        "teacher=served",
        f"teacher.address={address}",
        "teacher.tokens_per_request=100",
    )
    assert other.losses == pytest.approx(one.losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_share_a_server(tmp_path, address):
    both = ["strategy=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path / 'served'}"]
    done = end(
        start("train", *SMALL, *both, "teacher=served", f"teacher.address={address}", cwd=tmp_path),
        tmp_path / "served",
    )
    assert done.code == 0, done.err
    both[-1] = f"hydra.run.dir={tmp_path / 'local'}"
    local = end(start("train", *SMALL, *both, cwd=tmp_path), tmp_path / "local")
    # Which rows the server scores together depends on when both ask.
    assert done.losses == pytest.approx(local.losses, rel=1e-5)


def answered(address: str) -> int:
    """Return how many requests the server has answered with scores."""
    text = httpx2.get(f"{address}/metrics", trust_env=False).text
    found = [
        line for line in text.splitlines() if line.startswith('opd_teacher_requests_total{status="200"}')
    ]
    return int(found[0].split()[-1]) if found else 0


def begin(tmp_path: Path, name: str, address: str, *more: str) -> tuple[subprocess.Popen[str], Path]:
    """Begin a run of 24 optimizer steps on 12 collections with a served teacher."""
    arguments = [
        "debug=fast",
        "trainer.max_steps=24",
        "evaluation.teacher=false",
        "logger=[csv]",
        "support=student",
    ]
    folder = tmp_path / name
    served = ["teacher=served", f"teacher.address={address}", *more]
    return start("train", *arguments, *served, f"hydra.run.dir={folder}", cwd=tmp_path), folder


def wait_for(address: str, count: int) -> None:
    until = time.monotonic() + 600  # of a machine that does other things
    while answered(address) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_killed_and_started_again_costs_a_run_nothing(tmp_path):
    """The run waits, says so, and goes on: every loss is that of an undisturbed run."""
    port = f"port={free_port()}"
    with server(tmp_path, port) as (address, process):
        undisturbed = end(*begin(tmp_path, "undisturbed", address))
        assert undisturbed.code == 0, undisturbed.err
        before = answered(address)
        running, folder = begin(tmp_path, "disturbed", address, "teacher.patience_s=200")
        wait_for(address, before + 4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(3)
        assert running.poll() is None
        with server(tmp_path, port) as (again, _):
            assert again == address
            disturbed = end(running, folder)
            left = answered(address)
    assert disturbed.code == 0, disturbed.err
    assert 0 < left < 12
    assert f"no answer from the teacher at {address}" in disturbed.err
    assert "answers again after" in disturbed.err
    assert len(losses(folder)) == 24
    assert losses(folder) == undisturbed.losses
    assert columns(folder) == columns(undisturbed.folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_gone_for_good_ends_a_run_with_a_checkpoint(tmp_path):
    with server(tmp_path, "port=0") as (address, process):
        running, folder = begin(tmp_path, "run", address, "teacher.patience_s=4")
        wait_for(address, 5)
        process.kill()
        process.wait()
        gone = time.monotonic()
        done = end(running, folder)
    assert done.code == 2
    assert 3 < time.monotonic() - gone < 40
    last = done.err.strip().splitlines()[-1]
    assert f"`teacher.address` must name a server that answers, got none from {address} for 4 s" in last
    assert "Traceback" not in done.err
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    steps = len(losses(folder))
    assert 2 <= steps < 24
    import torch

    held = torch.load(checkpoint, weights_only=False)
    assert held["global_step"] == steps
    assert not [name for name in held["state_dict"] if "teacher" in name]


@pytest.mark.slow
def test_sigterm_ends_a_server_gracefully(tmp_path):
    with server(tmp_path, "port=0") as (address, process):
        assert httpx2.get(f"{address}/health", trust_env=False).status_code == 200
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.strip().endswith("stopped")
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_cache_changes_no_loss(tmp_path):
    """Filled, and read by a run of the same seed, whose rows come again."""
    cache = tmp_path / "cache"
    plain = run(tmp_path / "plain")
    filled = run(tmp_path / "filled", f"teacher.cache={cache}")
    rows = sorted(path for path in cache.rglob("*") if path.is_file())
    written = [path.stat().st_mtime_ns for path in rows]
    read = run(tmp_path / "read", f"teacher.cache={cache}")
    assert plain.losses == filled.losses == read.losses
    assert len(rows) == 16
    assert [path.stat().st_mtime_ns for path in sorted(p for p in cache.rglob("*") if p.is_file())] == written
    assert "(cached)" in read.out


# -- what is refused


@pytest.mark.parametrize(
    ("arguments", "field", "parts"),
    [
        (["host=0.0.0.0"], "host", ["loopback", "OPD_TEACHER_TOKEN", "ssh tunnel"]),
        (["port=70000"], "port", ["got 70000", "8765"]),
        (["tokens_per_batch=0"], "tokens_per_batch", ["got 0"]),
        (["max_body_mb=1.5"], "max_body_mb", ["whole number", "got 1.5"]),
        (["max_held_mb=100"], "max_held_mb", ["max_body_mb=64", "use 128 or more"]),
        (["context=0"], "context", ["null", "got 0"]),
        (["head_scratch_mb=0"], "head_scratch_mb", ["got 0"]),
        (["layout=wide"], "layout", ["buckets", "got 'wide'"]),
        (["accelerator=tpu"], "accelerator", ["got 'tpu'"]),
        (["+token=secret"], "token", ["unknown"]),
        (["teacher=served"], "teacher", ["a model by its path", "got 'ServedTeacher'"]),
        (["teacher.scoring_temperature=2"], "teacher.scoring_temperature", ["null in a server", "got 2"]),
    ],
)
def test_settings_of_a_server(tmp_path, models_stay_closed, monkeypatch, arguments, field, parts):
    monkeypatch.delenv("OPD_TEACHER_TOKEN", raising=False)
    refusal(here("serve_teacher", *arguments, folder=tmp_path / "run"), field, *parts)


def test_a_port_that_is_taken(tmp_path, address):
    port = address.rsplit(":", 1)[1]
    refusal(here("serve_teacher", f"port={port}", folder=tmp_path / "run"), "port", "in use", "port=0")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = here("train", *SMALL, f"teacher.cache={tmp_path / 'file'}", folder=tmp_path / "run")
    refusal(done, "teacher.cache", "can be written", "null")


def test_a_server_has_no_cache(tmp_path, models_stay_closed):
    refusal(here("serve_teacher", "teacher.cache=a", folder=tmp_path / "run"), "teacher.cache", "got 'a'")


@pytest.mark.parametrize("teacher", ["teacher=served", "teacher.cache=folder"])
@pytest.mark.parametrize(
    "arguments",
    [["support=full"], ["mask=[top_reverse_kl]"]],
    ids=["support", "mask"],
)
def test_whole_vocabularies_want_a_teacher_in_this_process(tmp_path, models_stay_closed, arguments, teacher):
    done = here("train", teacher, *arguments, folder=tmp_path / "run")
    refusal(
        done,
        "support",
        "served, cached, routed or sharded",
        "gives no hidden states",
        "a teacher in this process",
    )


def test_other_uses_of_the_teacher_want_it_in_this_process(tmp_path, address):
    served = ["teacher=served", f"teacher.address={address}"]
    done = here("train", *SMALL, *served, "rollout=mixture", "rollout.gold=teacher", folder=tmp_path / "run")
    refusal(done, "rollout", "got ServedScorer", "teacher=builtin")
    done = here("choose_horizon", *served, folder=tmp_path / "run")
    refusal(done, "teacher", "in this process", "got 'ServedTeacher'")


def test_a_teacher_that_is_not_there(tmp_path):
    served = ["teacher=served", f"teacher.address=http://127.0.0.1:{free_port()}", "teacher.patience_s=0"]
    done = here("train", *SMALL, *served, folder=tmp_path / "run")
    refusal(done, "teacher.address", "got none from http://127.0.0.1", "teacher.patience_s")


def test_a_token_is_in_no_file_of_a_run(tmp_path, monkeypatch):
    """It is named by its variable; what a run saves holds the name alone."""
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "hush-hush")
    with server(tmp_path, "port=0") as (address, _):
        assert httpx2.get(f"{address}/info", trust_env=False).status_code == 401
        done = run(tmp_path / "run", "teacher=served", f"teacher.address={address}")
    assert "OPD_TEACHER_TOKEN" in (done.folder / "config.yaml").read_text()
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if b"hush-hush" in path.read_bytes()]
    assert "hush-hush" not in done.out + done.err + json.dumps(done.summary)
