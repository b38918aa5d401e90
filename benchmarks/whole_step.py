"""A whole training step beside trl's on the same model files: tokens a second, memory, and where the time goes.

    python benchmarks/whole_step.py                               # about ten minutes on one core, most of it trl's
    python benchmarks/whole_step.py --vocab 32000 --repeats 3
    python benchmarks/whole_step.py --only trl_iw_opd ours_tail   # student's top 16 and the tail, like for like

Two-layer Qwen2 of width 64, its teacher of width 128, random and untied, float32; 8 prompts of 32 tokens, 128
response tokens each, AdamW. Each contestant trains in a process of its own, in alternating order. What is
compared, and what is unfair in either direction, stands in benchmarks/README.md. Needs trl
(pip install 'opd-lightning[parity]') and Linux. Writes a dated table into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from trials import RESULTS, about_here

OURS = {"ours_default": "default", "ours_full": "full", "ours_tail": "tail"}
TRL = {"trl_stable": "stable", "trl_gkd": "gkd", "trl_iw_opd": "iw_opd"}
WHAT = {
    "trl_stable": "trl `DistillationTrainer`, full reverse KL",
    "trl_gkd": "trl `GKDTrainer`, full reverse KL, dense",
    "trl_iw_opd": "trl `IWOPDTrainer`, student's top 16 + tail",
    "ours_default": "ours, default (teacher's top 16)",
    "ours_full": "ours, full reverse KL",
    "ours_tail": "ours, student's top 16 + tail",
}
USUAL = ["trl_stable", "ours_default", "ours_full", "trl_gkd"]
ONCE = {"trl_gkd", "trl_iw_opd"}  # the slowest, of which one run says enough
PHASES = ("generate", "score", "learn", "optimizer")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CI": "1",
}


def contest(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Train as one contestant, in this process; ``equality`` compares the first loss of all."""
    # Neither side's libraries may weigh on the other's memory.
    from steps import Job

    job = Job(folder=folder, steps=steps)
    if name in TRL:
        import peers

        return peers.train(getattr(peers, TRL[name]), job)
    import own

    if name != "equality":
        return own.train(OURS[name], job)[0]
    import peers

    result, first = own.train("full", Job(folder=folder, steps=1))
    return {"ours": result["losses"][0], **peers.first_losses(job, first)}


def child(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in a process of its own; a failed one raises with the end of what it said."""
    threads = str(args.threads)
    command = [sys.executable, __file__, "--run", name, str(folder), "--steps", str(args.steps)]
    env = os.environ | QUIET | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if "laps" in found:
        wall = statistics.fmean(lap["wall"] for lap in measured(found))
        print(f"{folder.name} {name}: {wall:.2f} s a step, {found['extra_mb']:.0f} MB", flush=True)
    return found


def measured(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the laps that count: the first two steps fill caches and allocate."""
    return run["laps"][2:]


def speed(run: dict[str, Any], clock: str) -> float:
    """Return response tokens a second of ``clock`` (wall or cpu)."""
    return 8 * 128 / statistics.fmean(lap[clock] for lap in measured(run))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median, and the range where there is one."""
    middle = f"{statistics.median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a line a contestant: speed and memory, their ratios to the first one's, and a step by phase."""

    def rate(name: str, clock: str) -> float:
        return statistics.median(speed(run, clock) for run in runs[name])

    def extra(name: str) -> float:
        return statistics.median(run["extra_mb"] for run in runs[name])

    base = next(iter(runs))
    head = ["contestant", "runs", "tokens/s", "tokens per CPU s", "ratio", "CPU ratio", "extra MB", "ratio"]
    head += ["CPU s a step", *PHASES, "other"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, found in runs.items():
        laps = [lap for run in found for lap in measured(run)]
        whole = statistics.median(lap["cpu"] for lap in laps)
        parts = [statistics.median(lap["phases"][phase] for lap in laps) for phase in PHASES]
        cells = [WHAT[name], str(len(found))]
        cells += [spread([speed(run, clock) for run in found]) for clock in ("wall", "cpu")]
        cells += [f"**{rate(name, clock) / rate(base, clock):.2f}**" for clock in ("wall", "cpu")]
        cells += [spread([run["extra_mb"] for run in found]), f"**{extra(name) / extra(base):.2f}**"]
        cells += [f"{seconds:.2f}" for seconds in (whole, *parts, max(whole - sum(parts), 0.0))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compare(vocab: int, args: argparse.Namespace) -> list[str]:
    """Run all contestants at one size of vocabulary and return their section."""
    from steps import Job

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"V={vocab}"
        Job(folder=folder).make(vocab)
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for repeat in range(args.repeats):
            order = args.only if repeat % 2 == 0 else args.only[::-1]
            for name in order:
                if repeat == 0 or name not in ONCE:
                    runs[name].append(child(name, folder, args))
        equal = child("equality", folder, args) if {"trl_stable", "ours_full"} <= {*args.only} else {}
    runs = {name: runs[name] for name in args.only}
    state = next(iter(runs.values()))[0]["state_mb"]
    section = ["", f"## V = {vocab:,}", "", *table(runs), ""]
    section += [f"Of the extra memory, {state:.0f} MB are the gradient and Adam's two moments, in all alike."]
    if equal:
        losses = ", ".join(f"{name} {value:.6f}" for name, value in equal.items())
        apart = abs(equal["ours"] - equal["stable"]) / equal["stable"]
        section += [
            f"Full reverse KL of the first step on the same responses: {losses}; ours and stable differ "
            f"by {apart:.1e} of it."
        ]
    return section


def main() -> None:
    """Compare, print and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first two do not count")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=WHAT, default=USUAL)
    parser.add_argument("--run", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        name, folder = args.run
        print("\n" + json.dumps(contest(name, Path(folder), args.steps)))
        return
    lines = [f"# Whole step beside trl, {date.today()}"]
    for vocab in args.vocab:
        lines += compare(vocab, args)
    command = " ".join(["python benchmarks/whole_step.py", *sys.argv[1:]])
    lines[1:1] = ["", about_here(command, f"{args.threads} thread(s) a contestant")]
    lines += [
        "",
        f"Medians over runs (range in brackets), steps 3 to {args.steps} of each; ratios are to the first line. The "
        "phases are CPU seconds of a step. Score: the teacher, and for ours the probe; trl's stable trainer has the "
        "teacher's head inside learn. Optimizer: for ours with clipping.",
    ]
    text = "\n".join(lines) + "\n"
    others = [] if args.only == USUAL else args.only
    stem = "_".join([str(date.today()), "whole_step", *others])
    (RESULTS / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
