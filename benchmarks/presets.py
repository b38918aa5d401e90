"""Every preset on the built-in task: same updates, three seeds, fresh problems.

python benchmarks/presets.py                      # all presets, seeds 0 1 2, two at a time
python benchmarks/presets.py sampled_token esr    # some of them
"""

from __future__ import annotations

import os
import sys
from datetime import date
from pathlib import Path

from gradient_noise import noise_to_signal
from hydra import compose, initialize_config_dir
from trials import RESULTS, Job, Result, about, by_name, mean_of, run_all

from opd_lightning.paths import CONF_DIR

SEEDS = (0, 1, 2)
STEPS = 120
# Problems that no choice was made on: another seed of the task, the whole validation split.
COMMON = (
    f"trainer.max_steps={STEPS}",
    "task.seed=2026",
    "evaluation.every_steps=null",
    "scheduler.warmup_steps=10",
)
SAME = ("local_support_matching_v1",)  # as local_support_matching, to the last value
CONTROLS = ("sft_fresh", "sft_pool", "self_train")
SCORE_RATE = "optimizer.lr=5e-4"  # score-function estimators leave the ground at the others' 1e-3


def overrides(name: str) -> tuple[str, ...]:
    """Return a preset's overrides; the learning rate goes by the kind of its estimator, for all presets alike."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        estimator = compose("train", [f"experiment={name}"]).estimator._target_
    score = estimator.rsplit(".", 1)[-1] in ("Token", "Discounted", "Sequence")
    return (f"experiment={name}", *COMMON, *([SCORE_RATE] if score else []))


def main() -> None:
    """Run, print and write the table."""
    known = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
    names = sys.argv[1:] or [*(n for n in known if n not in (*CONTROLS, *SAME)), *CONTROLS]
    jobs = [Job(name, seed, overrides(name)) for seed in SEEDS for name in names]
    store = Path(RESULTS) / f"{date.today()}_presets.jsonl"
    found = run_all(jobs, store, processes=int(os.environ.get("PROCESSES", "2")))
    text = "\n".join([about(command(), found), "", *table(by_name(found))]) + "\n"
    (Path(RESULTS) / f"{date.today()}_presets_table.md").write_text(text)
    print(text)


def command() -> str:
    """Return this command line."""
    return " ".join(["python benchmarks/presets.py", *sys.argv[1:]])


def table(groups: dict[str, list[Result]]) -> list[str]:
    """Return the table's lines, best greedy accuracy first."""
    header = [
        "| preset | greedy, each seed | greedy | sampled | tokens | CPU s | gradient norm | noise/signal "
        "| cut | repeated |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(
        groups.items(), key=lambda item: -mean_of([r.summary["accuracy_after"] for r in item[1]])
    )
    return header + [row(name, results) for name, results in ordered]


def row(name: str, results: list[Result]) -> str:
    """Return one preset's line: means over seeds; cut and repeated are of the final evaluation's samples.

    CPU seconds are the least of the seeds, imports and two evaluations included: other runs on the machine add up to as
    much again.
    """
    greedy = [r.summary["accuracy_after"] for r in results]
    final = [r.summary["evaluations"][str(r.summary["optimizer_steps"])] for r in results]
    cells = [
        name,
        " / ".join(f"{100 * a:.1f}" for a in greedy),
        f"**{100 * mean_of(greedy):.1f}**",
        f"{100 * mean_of([r.summary['accuracy_after_sampled'] for r in results]):.1f}",
        f"{mean_of([r.summary['response_tokens'] for r in results]) / 1000:.0f} k",
        f"{min(r.cpu_seconds for r in results):.0f}",
        f"{mean_of([r.mean('train/grad_norm') for r in results]):.2f}",
        f"{noise_to_signal(list(overrides(name))):.1f}",
        f"{100 * mean_of([f['eval/truncation_sampled'] for f in final]):.1f} %",
        f"{100 * mean_of([f.get('eval/repetition_sampled', float('nan')) for f in final]):.1f} %",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
