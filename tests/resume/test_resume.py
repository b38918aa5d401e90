"""A run that was cut off goes on as if nothing had happened."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd_lightning.errors import ConfigError
from opd_lightning.resume.finding import forget
from tests.commands.running import end, here, start

SHORT = [
    "trainer.max_steps=8",
    "collector.prompts_per_collection=6",
    "collector.steps_per_collection=3",
    "callbacks.checkpoint.every_steps=2",
    "callbacks.checkpoint.keep=9",
    "evaluation.every_steps=4",
    "evaluation.settings.problems=4",
    "evaluation.settings.max_new_tokens=24",
    "evaluation.teacher=false",
    "rollout.max_new_tokens=24",
    "trainer.accumulate_grad_batches=2",
    "trainer.enable_progress_bar=false",
    "reporting.peak_tflops=1",
]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in r.items() if v and not k.startswith("time/")} for r in csv.DictReader(file)]


def same_end(folder: Path, whole: Path) -> None:
    one, other = (load_file(f / "student" / "model.safetensors") for f in (whole, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rows(folder) == rows(whole)
    mine, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    for name in ("evaluations", "accuracy_before", "accuracy_after"):
        assert mine[name] == theirs[name]


CASES = {
    "default": [],
    "ema": ["teacher=ema", "teacher.decay=0.5"],
    "full": ["support=full", "student/lora=default"],
    "schedule": ["experiment=esr_progressive", "scheduler=cosine"],
    "ahead": ["engine.ahead=1"],
    "router": [
        *("teacher=router", "+teacher@teacher.teachers.mean=ema", "teacher.teachers.mean.decay=0.5"),
        "teacher.routes={3 steps: mean, 4 steps: mean, 5 steps: mean, 6 steps: mean}",
    ],
}


def cut(whole: Path, folder: Path, step: int) -> None:
    """Leave what a kill after ``step`` optimizer steps and their checkpoint would have left, and a bit of the next."""
    folder.mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    text = (whole / "config.yaml").read_text().replace(str(whole), str(folder))
    (folder / "config.yaml").write_text(text)
    (folder / "metrics.csv").write_text((whole / "metrics.csv").read_text()[:-40])
    for path in (whole / "checkpoints").iterdir():
        if int(path.stem.rsplit("=", 1)[1]) <= step and not path.name.startswith("best"):
            (folder / "checkpoints" / path.name).write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """The unbroken run of each case, made when it is asked for."""
    made: dict[str, Path] = {}

    def whole(case: str) -> Path:
        if case not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            done = here("train", *SHORT, *CASES[case], folder=folder)
            assert done.code == 0, done.err
            made[case] = folder
        return made[case]

    return whole


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_from_any_checkpoint(step, wholes, tmp_path):
    """2: within a collection; 4: an evaluation is due; 6: at a border of collections; 8: the end."""
    whole, folder = wholes("default"), tmp_path / "run"
    cut(whole, folder, step)
    done = here("train", *SHORT, "resume=auto", folder=folder)
    assert done.code == 0, done.err
    assert f"resumed   {folder} from step={step}.ckpt" in done.out
    same_end(folder, whole)


@pytest.mark.parametrize("case", ["ema", "full", "schedule", "ahead", "router"])
def test_every_kind_of_state(case, wholes, tmp_path):
    whole, folder = wholes(case), tmp_path / "run"
    cut(whole, folder, 2)
    done = here("train", *SHORT, *CASES[case], f"resume={folder}", folder=tmp_path / "new")
    assert done.code == 0, done.err
    same_end(folder, whole)
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_passed_over(wholes, tmp_path):
    whole, folder = wholes("default"), tmp_path / "run"
    cut(whole, folder, 4)
    latest = folder / "checkpoints" / "step=4.ckpt"
    latest.write_bytes(latest.read_bytes()[:1000])
    done = here("train", *SHORT, "resume=auto", folder=folder)
    assert "from step=2.ckpt" in done.out
    same_end(folder, whole)


def test_auto_finds_the_run_of_the_same_command(wholes, tmp_path, monkeypatch):
    """Among others, by configuration; a new folder that is not needed does not stay."""
    whole = wholes("default")
    cut(whole, tmp_path / "runs" / "2026-01-01" / "10-00-00", 4)
    cut(whole, tmp_path / "runs" / "2026-01-02" / "11-00-00", 2)
    other = tmp_path / "runs" / "2026-01-02" / "11-00-00" / "config.yaml"
    other.write_text(other.read_text().replace("seed: 0", "seed: 9"))
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "opd_lightning.train", *SHORT, "resume=auto"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "2026-01-01" / "10-00-00"
    assert f"resumed   {folder} from step=4.ckpt" in done.stdout
    assert sorted(p.name for p in (tmp_path / "runs").glob("*/*")) == ["10-00-00", "11-00-00"]
    same_end(folder, whole)


def test_a_finished_run_is_left_as_it_is(wholes):
    whole = wholes("default")
    before = (whole / "summary.json").stat().st_mtime_ns
    done = here("train", *SHORT, "resume=auto", folder=whole)
    assert done.code == 0, done.err
    assert "is finished" in done.out
    assert (whole / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("ended", [4, 5])
def test_a_finished_run_is_extended(ended, wholes, tmp_path):
    """After a step with a checkpoint of its own, and after one whose checkpoint is that of the end."""
    whole, folder, more = wholes("default"), tmp_path / "run", "trainer.max_steps=8"
    done = here("train", *SHORT, f"trainer.max_steps={ended}", folder=folder)
    assert done.code == 0, done.err
    before = (folder / "summary.json").read_bytes()
    done = here(
        "train", *SHORT, more, "callbacks.stopping.after_minutes=0.0001", "resume=auto", folder=folder
    )
    assert done.code == 124
    assert (folder / "summary.json").read_bytes() == before
    named = "resume=auto" if ended == 4 else f"resume={folder}"
    done = here("train", *SHORT, more, named, folder=folder if ended == 4 else tmp_path / "new")
    assert done.code == 0, done.err
    assert f"resumed   {folder} from step=" in done.out
    assert (
        "than it began with: trainer.max_steps; schedules are those of the new total" in done.out + done.err
    )
    same_end(folder, whole)
    assert json.loads((folder / "summary.json").read_text())["optimizer_steps"] == 8
    for steps in (8, 3):
        again = here("train", *SHORT, f"trainer.max_steps={steps}", "resume=auto", folder=folder)
        assert f"the run in {folder} is finished" in again.out


def test_an_extended_decay_goes_on_over_the_new_total(wholes, tmp_path):
    """At step 4 of 4 a cosine has reached 0; at step 4 of 8 it is at the half."""
    folder, shape = tmp_path / "run", ["scheduler=cosine", "scheduler.warmup_steps=0"]
    assert here("train", *SHORT, *shape, "trainer.max_steps=4", folder=folder).code == 0
    assert here("train", *SHORT, *shape, "resume=auto", folder=folder).code == 0
    rates = [float(row["train/lr"]) / 1e-3 for row in rows(folder) if "train/lr" in row]
    expected = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(expected + [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(4, 8)])


def test_a_finished_run_without_checkpoints_is_not_extended(wholes, tmp_path):
    folder = tmp_path / "run"
    cut(wholes("default"), folder, 0)
    (folder / "summary.json").write_bytes((wholes("default") / "summary.json").read_bytes())
    done = here("train", *SHORT, "trainer.max_steps=9", "resume=auto", folder=folder)
    assert "`trainer.max_steps` must be at most the 8 of the finished run in" in done.sentence


def test_a_finished_run_of_another_command_is_left_alone(wholes, tmp_path, caplog):
    """One that was not named: what it has found would be replaced."""
    from opd_lightning.resume.finding import find

    whole, folder = wholes("default"), tmp_path / "runs" / "day" / "time"
    cut(whole, folder, 8)
    (folder / "summary.json").write_bytes((whole / "summary.json").read_bytes())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    other = tmp_path / "runs" / "day" / "later"
    found = find("auto", config, other, 2)
    assert found is not None
    assert found.finished
    forget()
    config["trainer"]["max_steps"] = 16
    with caplog.at_level("INFO"):
        assert find("auto", config, other, 2) is None
    assert f"has finished after 8 steps in {folder}: resume={folder} goes on with it" in caplog.text
    found = find(str(folder), config, other, 2)
    forget()
    assert found is not None
    assert (found.finished, found.step) == (False, 8)


def test_other_settings_are_said(wholes, tmp_path):
    folder = tmp_path / "run"
    cut(wholes("default"), folder, 6)
    done = here("train", *SHORT, "optimizer.lr=1e-6", "resume=auto", folder=folder)
    assert done.code == 0, done.err
    assert "other settings than it began with: optimizer.lr" in done.out + done.err
    rates = [float(row["train/lr"]) for row in rows(folder) if "train/lr" in row]
    assert rates[-2:] == pytest.approx([1e-6 * 7 / 20, 1e-6 * 8 / 20])  # the schedule's warm-up


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["resume=nowhere"], "`resume` must be null, auto or the folder of a run, got 'nowhere'"),
        (["resume=FOLDER", "student.dtype=bfloat16"], "`student.dtype` must be that of the run in"),
    ],
)
def test_what_cannot_go_on_is_refused(overrides, sentence, wholes, tmp_path):
    folder = tmp_path / "run"
    cut(wholes("default"), folder, 2)
    asked = [override.replace("FOLDER", str(folder)) for override in overrides]
    done = here("train", *SHORT, *asked, folder=tmp_path / "new")
    assert sentence in done.sentence


def test_its_own_folder_is_refused_to_another_student_too(wholes, tmp_path):
    folder = tmp_path / "run"
    cut(wholes("default"), folder, 2)
    done = here("train", *SHORT, "student.dtype=bfloat16", "resume=auto", folder=folder)
    assert "`student.dtype` must be that of the run in" in done.sentence


@pytest.mark.parametrize("steps", ["many", "null", "2.5", "true", "0"])
def test_no_number_of_steps_is_a_sentence_with_resume_too(steps, wholes, tmp_path):
    folder = tmp_path / "run"
    cut(wholes("default"), folder, 2)
    done = here("train", *SHORT, f"trainer.max_steps={steps}", "resume=auto", folder=folder)
    assert "`trainer.max_steps` must be at least 1 optimizer step, got" in done.sentence


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_checkpoint(number, wholes, tmp_path):
    whole, folder = wholes("default"), tmp_path / "run"
    command = [sys.executable, "-m", "opd_lightning.train", *SHORT, f"hydra.run.dir={folder}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (folder / "checkpoints" / "step=2.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in out + err
    assert f"stopped by {number.name}; the same command with resume={folder} goes on from step=" in err
    assert not (folder / "summary.json").exists()
    done = here("train", *SHORT, "resume=auto", folder=folder)
    assert done.code == 0, done.err
    assert "resumed" in done.out
    same_end(folder, whole)


@pytest.mark.parametrize("step", [0, 8])
def test_a_signal_in_the_first_or_last_evaluation_is_a_sentence(step, wholes, tmp_path):
    """Before training nothing is saved, and after it the end is on the disk already."""
    folder, hook = tmp_path / "run", "callbacks.evaluating"
    process = start(
        "train",
        *SHORT,
        "evaluation.every_steps=3",
        *(f"+{hook}._target_=tests.resume.interrupting.Evaluating", f"+{hook}.step={step}"),
        f"hydra.run.dir={folder}",
        cwd=Path(__file__).parents[2],
    )
    done = end(process, folder)
    assert done.code == 143, done.err
    assert "Traceback" not in done.out + done.err
    assert f"stopped by SIGTERM; the same command with resume={folder} goes on from" in done.err
    assert not (folder / "summary.json").exists()
    assert (folder / "checkpoints" / "step=8.ckpt").exists() == (step == 8)
    done = here("train", *SHORT, "evaluation.every_steps=3", "resume=auto", folder=folder)
    assert done.code == 0, done.err
    one, other = (load_file(f / "student" / "model.safetensors") for f in (wholes("default"), folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("within", "step", "goes_on"),
    [
        ("checkpoint", 2, "from step=2.ckpt, its latest checkpoint"),
        ("checkpoint", 0, "from its beginning: it has no checkpoint"),
        ("step", 2, "from step=2.ckpt, its latest checkpoint"),
    ],
)
def test_a_second_interrupt_ends_it_at_once(within, step, goes_on, wholes, tmp_path):
    """Within the first one's checkpoint, or before there is one: what was there before stays, and goes on."""
    folder, hook = tmp_path / "run", "callbacks.twice"
    target = f"+{hook}._target_=tests.resume.interrupting.Twice"
    process = start(
        "train",
        *SHORT,
        *(target, f"+{hook}.step={step}", f"+{hook}.within={within}", f"hydra.run.dir={folder}"),
        cwd=Path(__file__).parents[2],
    )
    done = end(process, folder)
    assert done.code == 130, done.err
    assert "Traceback" not in done.out + done.err
    expected = (
        "stopped by a second signal, SIGINT, without waiting for a checkpoint; the same command with resume="
    )
    assert f"{expected}{folder} goes on {goes_on}" in done.err
    left = list((folder / "checkpoints").iterdir()) if (folder / "checkpoints").is_dir() else []
    assert [path.name for path in left if "best" not in path.name] == (["step=2.ckpt"] if step else [])
    if within == "checkpoint" and step:
        done = here("train", *SHORT, "resume=auto", folder=folder)
        assert done.code == 0, done.err
        assert "from step=2.ckpt" in done.out
        same_end(folder, wholes("default"))


def test_a_time_limit_ends_it_with_a_checkpoint(wholes, tmp_path):
    folder, limit = tmp_path / "run", "callbacks.stopping.after_minutes"
    done = here("train", *SHORT, f"{limit}=0.0001", folder=folder)
    assert done.code == 124, done.err
    assert not list(folder.glob("checkpoints/*"))  # it had taken no step yet
    done = here("train", *SHORT, "resume=auto", folder=folder)
    assert done.code == 0, done.err
    same_end(folder, wholes("default"))
    assert f"`{limit}` must be above 0" in here("train", f"{limit}=0", folder=tmp_path / "no").sentence


def test_a_new_run_leaves_an_earlier_one_alone(wholes):
    """Else what is found there later is the earlier run's: its end, or checkpoints of more steps."""
    whole = wholes("default")
    done = here("train", *SHORT, "optimizer.lr=1e-6", folder=whole)
    assert "`hydra.run.dir` must be a folder without another run's checkpoints" in done.sentence
    assert "resume=auto" in done.sentence


@pytest.mark.parametrize("text", ["", "student: {path: a}", "- a", "a: [", "\x00"])
def test_a_configuration_that_was_cut_off_is_passed_over(text, wholes, tmp_path):
    """A kill as it is written, or a file of another program: in the run's own folder, and beside it."""
    from opd_lightning.resume.finding import find

    config = yaml.safe_load((wholes("default") / "config.yaml").read_text())
    folder = tmp_path / "runs" / "day" / "time"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(text)
    assert find("auto", config, folder, 2) is None
    assert find("auto", config, tmp_path / "runs" / "day" / "later", 2) is None
    with pytest.raises(ConfigError, match="`resume` must be"):
        find(str(folder), config, tmp_path / "new", 2)


def test_a_folder_has_one_run_at_a_time(wholes, tmp_path):
    from opd_lightning.resume.finding import alone

    folder = tmp_path / "run"
    with alone(folder):
        done = here("train", *SHORT, folder=folder)
    assert "a folder that no other run writes to" in done.sentence
