"""Is a run that was killed and resumed the run that was not killed? kill -9 at many moments, compared bit by bit.

python benchmarks/crashes.py                   # 20 kills, seed 0; about 12 minutes on two cores
python benchmarks/crashes.py --kills 4 --seed 7
python benchmarks/crashes.py --processes 2 --strategy fsdp --kills 10   # one of two processes, the other, or both

Of two processes the one that lives on has to end too, and its seconds and sentence are noted.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from crash_hook import PHASES, TOGETHER, VICTIMS, killed_in
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_lightning.commands import git_commit

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
RUN = (
    "evaluation.settings.problems=32",
    "evaluation.teacher=false",
    "collector.steps_per_collection=3",  # a checkpoint may fall within a collection
    "trainer.accumulate_grad_batches=2",
    "rollout.max_new_tokens=96",
    "teacher=ema",  # an average that only the run's past could give
    "trainer.enable_progress_bar=false",
    "reporting.peak_tflops=1",
)
LONGEST = 120.0
"""Seconds after a kill in which the processes that are left must have ended."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run: by one process as long as it takes to kill it at many places, by several for a shorter time."""

    processes: int = 1
    strategy: str = "auto"
    steps: int = 48
    saved: int = 8

    @property
    def overrides(self) -> tuple[str, ...]:
        """The command's words."""
        return (
            *RUN,
            f"trainer.max_steps={self.steps}",
            f"callbacks.checkpoint.every_steps={self.saved}",
            f"evaluation.every_steps={2 * self.saved}",
            f"collector.prompts_per_collection={48 if self.processes == 1 else 24}",
            f"trainer.devices={self.processes}",
            f"strategy={self.strategy}",
        )

    def drawn(self, number: int, seed: int) -> list[Kill]:
        """Return ``number`` moments, as many in each phase; of several processes, each victim in turn."""
        generator = random.Random(seed)
        phases = PHASES if self.processes == 1 else TOGETHER
        # The last collection may be over before its moment comes.
        collections, saves = self.steps // 3 - (self.processes > 1), self.steps // self.saved
        most = {"generate": collections, "score": collections, "backward": 2 * self.steps}
        kills = []
        for i in range(number):
            phase = phases[i % len(phases)]
            count = generator.randint(1, most.get(phase, saves))
            part, victim = round(generator.random() * 0.9, 2), "0" if self.processes == 1 else VICTIMS[i % 3]
            kills.append(Kill(phase=phase, count=count, part=part, victim=victim))
        return kills


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Where a run is killed: in the ``count``-th phase of its kind, ``part`` of the way through it, and who."""

    phase: str
    count: int
    part: float
    victim: str

    def overrides(self, note: Path) -> list[str]:
        """Return the callback that does it."""
        values = {"_target_": "crash_hook.KillAt", **vars(self), "note": note}
        return [f"+callbacks.kill.{name}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Done:
    """A command that ended, with all of its processes; ``hung`` where some had to be killed in the end."""

    code: int
    out: str
    err: str
    ended: float
    hung: bool


def train(setting: Setting, folder: Path, *overrides: str) -> Done:
    """Run the command with one thread a process, in a process group of its own."""
    words = [*setting.overrides, f"hydra.run.dir={folder}", *overrides]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "opd_lightning.train", *words],
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        code = process.wait()
        hung = not ended(process.pid)
        for file in (out, err):
            file.seek(0)
        return Done(code, out.read(), err.read(), time.time(), hung)


def ended(group: int) -> bool:
    """Wait until the processes of a group have ended; kill those that have not after :data:`LONGEST`."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return False


def left(setting: Setting, folder: Path) -> dict[str, Any]:
    """Return what a finished run left, seconds and speeds left out."""
    with (folder / "metrics.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if v and not k.startswith("time/")} for row in csv.DictReader(file)
        ]
    events = EventAccumulator(str(folder)).Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(("time/", "hp_metric"))
    }
    saved = torch.load(folder / "checkpoints" / f"step={setting.steps}.ckpt", weights_only=True)
    return {
        "student": load_file(folder / "student" / "model.safetensors"),
        "metrics.csv": rows,
        "TensorBoard": curves,
        "optimizer": saved["optimizer_states"],
        "scheduler": saved["lr_schedulers"],
        "teacher's average": saved["teacher"],
        "random numbers": saved["OnPolicyData"]["processes"],
        "tokens": saved["OnPolicyData"]["clock"]["charged"][1],
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def crash(setting: Setting, kill: Kill, whole: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Kill a run, resume it by the same command, and compare its end with that of the whole one."""
    begun, note = time.time(), folder.with_suffix(".killed")
    dead = train(setting, folder, *kill.overrides(note))
    killed = float(note.read_text()) if note.exists() else dead.ended
    done = vars(kill) | {"seconds": round(killed - begun, 1), "half": killed_in(folder)}
    done |= {"killed": note.exists(), "others": round(dead.ended - killed, 1), "hung": dead.hung, "said": ""}
    sentences = [line for line in dead.err.splitlines() if line.startswith("error: ")]
    if setting.processes > 1 and kill.victim != "all":
        done["said"] = sentences[0] if sentences else "nothing"
        done["hung"] = dead.hung or not sentences or "Traceback" in dead.err
    resumed = train(setting, folder, "resume=auto")
    lines = [line for line in resumed.out.splitlines() if line.startswith("resumed")]
    done["from"] = lines[0].rsplit(" ", 1)[-1] if lines else "?"
    if resumed.code:
        return done | {"differs": resumed.err[-2000:]}
    return done | {"differs": differing(whole, left(setting, folder))}


def differing(whole: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what is not the same to the last bit, of the table by column and the first of its values."""
    names = [name for name in whole if not same(whole[name], now[name])]
    for one, other in zip(whole["metrics.csv"], now["metrics.csv"], strict=False):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                return ", ".join(
                    [*names, f"{key} {one.get(key)} and {other.get(key)} at step {one.get('step')}"]
                )
    return ", ".join(names)


def table(setting: Setting, results: list[dict[str, Any]]) -> list[str]:
    """Return the kills as markdown."""
    several = setting.processes > 1
    head = ["killed in", "time", "part of it", "after s", "went on from", "left half done"]
    head = head[:1] + ["who", "the rest ended after s"] * several + head[1:] + ["end beside the whole run"]
    rows = [head, ["---"] * len(head)]
    for r in results:
        end = "not killed" if not r["killed"] else r["differs"] or "bit-equal"
        end += ", the rest hung or said nothing" * r["hung"]
        who = ["both" if r["victim"] == "all" else f"rank {r['victim']}", r["others"]] if several else []
        cells = [
            r["phase"],
            *who,
            r["count"],
            f"{r['part']:.2f}",
            r["seconds"],
            r["from"],
            r["half"] or "-",
            end,
        ]
        rows.append([str(cell) for cell in cells])
    return [f"| {' | '.join(row)} |" for row in rows]


def said(results: list[dict[str, Any]]) -> list[str]:
    """Return each sentence of processes that were left, without the run's own folder and number."""
    texts = {re.sub(r"resume=\S+", "resume=…", r["said"]) for r in results if r["said"]}
    texts = {
        re.sub(r"\[[^]]*\]:\d+", "[…]", re.sub(r"\[/\S*?(\w+\.cc:\d+)\]", r"[\1]", text)) for text in texts
    }
    return [
        "",
        "What the process that was left said:",
        "",
        *(f"- `{text}`" for text in sorted(texts)),
    ] * bool(texts)


def main() -> None:
    """Kill, resume, compare, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--strategy", default="auto", choices=("auto", "ddp", "fsdp"))
    parser.add_argument("--at-once", type=int, default=None, help="runs at a time; 2, and 1 of two processes")
    arguments = parser.parse_args()
    shorter = {"steps": 12, "saved": 4} if arguments.processes > 1 else {}
    setting = Setting(processes=arguments.processes, strategy=arguments.strategy, **shorter)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        begun = time.perf_counter()
        first = train(setting, root / "whole")
        assert first.code == 0, first.err
        seconds = time.perf_counter() - begun
        whole = left(setting, root / "whole")
        kills = setting.drawn(arguments.kills, arguments.seed)
        with ThreadPoolExecutor(arguments.at_once or 3 - setting.processes) as pool:
            jobs = [pool.submit(crash, setting, kill, whole, root / str(i)) for i, kill in enumerate(kills)]
            results = [job.result() for job in jobs]
    lines = written(setting, arguments, seconds, results)
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    several = f"_{setting.processes}_{setting.strategy}" if setting.processes > 1 else ""
    (RESULTS / f"{date.today()}_crashes{several}.md").write_text("\n".join(lines) + "\n")
    sys.exit(not all(good(r) for r in results))


def good(result: dict[str, Any]) -> bool:
    """Return whether a run was killed, ended whole, and went on to the same end."""
    return bool(result["killed"] and not result["differs"] and not result["hung"])


def written(
    setting: Setting, arguments: argparse.Namespace, seconds: float, results: list[dict[str, Any]]
) -> list[str]:
    """Return the result as markdown."""
    options = f"--kills {arguments.kills} --seed {arguments.seed}"
    if setting.processes > 1:
        options = f"--processes {setting.processes} --strategy {setting.strategy} {options}"
    who = "Each process kills itself with SIGKILL."
    if setting.processes > 1:
        who = f"Two processes (gloo, strategy={setting.strategy}), of which one is killed with SIGKILL, or both."
    return [
        f"# {arguments.kills} kills, {sum(map(good, results))} resumed runs bit-equal to the whole one",
        "",
        f"`python benchmarks/crashes.py {options}` at commit {git_commit()}, "
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread a process, torch "
        f"{torch.__version__}. The whole run took {seconds:.0f} s: {setting.steps} optimizer steps, a checkpoint every "
        f"{setting.saved}, collections of 3 steps, two micro-batches a step, an ema teacher. Compared: the student's "
        "file, metrics.csv, TensorBoard's curves, and in the last checkpoint the optimizer, the schedule, the "
        "teacher's average, the random number generators of every process and the tokens counted; seconds and speeds "
        f"are left out. {who}",
        "",
        *table(setting, results),
        *said(results),
    ]


if __name__ == "__main__":
    main()
