"""One of two processes is lost: the other ends with a sentence, and the same command goes on to the same end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.test_two_processes import Done, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

HOOKS = Path(__file__).resolve().parents[2] / "benchmarks"
RUN = [
    "trainer.devices=2",
    "strategy=fsdp",
    "collector.steps_per_collection=2",
    "callbacks.checkpoint.every_steps=1",
    "callbacks.checkpoint.keep=9",
    "callbacks.samples.count=0",
    "evaluation.every_steps=null",
    "evaluation.settings.problems=2",
    "evaluation.settings.samples=0",
    "evaluation.teacher=false",
    "rollout.max_new_tokens=40",
    "reporting.peak_tflops=1",
]
ALONE = """
import lightning as L
from opd_lightning.errors import ConfigError

class Fail(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            raise ConfigError("`disk` must have room, got none; free some")
"""


@pytest.fixture(autouse=True)
def hooks(monkeypatch, tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    paths = [str(HOOKS), str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Done:
    done = train(tmp_path_factory.mktemp("whole") / "run", *RUN)
    assert done.code == 0, done.err
    return done


def kill(phase: str, count: int, part: float, victim: str) -> list[str]:
    values = {"_target_": "crash_hook.KillAt", "phase": phase, "count": count, "part": part, "victim": victim}
    return [f"+callbacks.kill.{name}={value}" for name, value in values.items()]


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_killed_while_the_first_process_writes_a_checkpoint(whole, tmp_path):
    """The second has given its part: what the first is writing is whole, and the run goes on from it or before."""
    begun = time.monotonic()
    dead = train(tmp_path / "run", *RUN, *kill("checkpoint", 2, 0.3, "1"))
    assert time.monotonic() - begun < 300
    assert dead.code == 75, dead.err
    assert (
        dead.err.count("error: the processes of a run must all stay alive, got process 1 killed by SIGKILL")
        == 1
    )
    assert "Traceback" not in dead.err
    assert "step=1.ckpt" in names(dead.folder) <= {"step=1.ckpt", "step=2.ckpt", ".step=2.ckpt.part"}
    same_end(train(dead.folder, *RUN, "resume=auto"), whole)


def test_the_first_process_killed_while_the_second_gives_its_part(whole, tmp_path):
    """Before anything is written. Nobody is left to say it but the second."""
    dead = train(tmp_path / "run", *RUN, *kill("gather", 2, 0.0, "0"))
    assert dead.code == -9
    assert (
        dead.err.count("error: the processes of a run must all stay alive, got the first process gone") == 1
    )
    assert "Traceback" not in dead.err
    assert names(dead.folder) == {"step=1.ckpt"}


def same_end(done: Done, whole: Done) -> None:
    assert done.code == 0, done.err
    assert "resumed   " in done.out
    assert all(torch.equal(done.weights[name], weight) for name, weight in whole.weights.items())
    assert done.rows == whole.rows
    mine, theirs = (run.checkpoint["OnPolicyData"]["processes"] for run in (done, whole))
    assert len(mine) == 2
    for rank in range(2):
        assert torch.equal(mine[rank]["random"]["torch"], theirs[rank]["random"]["torch"])
        assert mine[rank]["random"]["python"] == theirs[rank]["random"]["python"]


def test_a_process_that_fails_alone_ends_the_run(tmp_path):
    """It waits for nobody to save with; the first process says what was lost, behind the sentence about why."""
    words = ["strategy=ddp", "callbacks.checkpoint.every_steps=9", "+callbacks.fail._target_=alone.Fail"]
    done = train(tmp_path / "run", *RUN, *words)
    assert done.code == 75, done.err
    assert "error: `disk` must have room, got none; free some\n" in done.err
    assert "got process 1 ended with exit code 2" in done.err
    assert "Traceback" not in done.err
    assert not (done.folder / "checkpoints").exists()


WATCHED = """
import subprocess, sys, threading, time
from pathlib import Path
from opd_lightning import launching

launching.GRACE = 0.2
started = [subprocess.Popen(["sleep", "60"]), subprocess.Popen(["sleep", "60"])]
print(started[1].pid, flush=True)
over = threading.Event()
threading.Thread(target=launching._watch, args=(lambda: started, Path("run"), over), daemon=True).start()
started[0].kill()
time.sleep(60)
"""


def test_a_process_that_is_busy_is_ended_too():
    """In no collective, which would find it out: here it sleeps."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True)
    assert time.monotonic() - begun < 55
    assert done.returncode == 75
    assert "got process 1 killed by SIGKILL; look for" in done.stderr
    assert "resume=run goes on" in done.stderr
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process was left behind")


def test_nobody_to_tell_keeps_none_alive():
    """With standard error closed the process ends all the same."""
    closed = WATCHED.replace("started[0].kill()", "sys.stderr.close(); started[0].send_signal(40)")
    done = subprocess.run([sys.executable, "-c", closed], capture_output=True, text=True, timeout=55)
    assert done.returncode == 75
