"""Does stopping early pay? Cost per step and accuracy against N, fixed and growing, up to the full rollout.

python benchmarks/esr.py
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

from runs import RESULTS, Job, Result, about, by_name, mean_of, run_all

FULL = 128
STEPS = 120
FIXED = (16, 32, 48, 64, 96)
COMMON = (
    *("task.seed=2026", "scheduler.warmup_steps=10", "estimator=topk", "support=teacher"),
    *(
        "evaluation.every_steps=null",
        "evaluation.settings.samples=0",
        "rollout.temperature=1.0",
        "rollout.top_p=1.0",
    ),
)
LINEAR = "{_target_: opd_lightning.schedule.Linear, start: 16, end: 128}"
STEP = "{_target_: opd_lightning.schedule.Step, before: 48, after: 128, at: 0.5}"


def kinds() -> dict[str, tuple[str, ...]]:
    """Return the runs: equal steps first, then as many steps as the full rollout's cost buys."""
    fixed = {f"N={n}": ("rollout=esr", f"rollout.max_new_tokens={n}") for n in FIXED}
    growing = {
        "N grows 16 to 128": ("rollout=esr", f"rollout.max_new_tokens={LINEAR}"),
        "N 48, then 128": ("rollout=esr", f"rollout.max_new_tokens={STEP}"),
        "loss grows, generation full": (
            *("rollout=esr_progressive", f"rollout.max_new_tokens={FULL}", f"rollout.loss_horizon={LINEAR}"),
        ),
    }
    full = {f"full ({FULL})": ("rollout=top_p", f"rollout.max_new_tokens={FULL}")}
    return fixed | growing | full


def equal_cost(found: dict[str, list[Result]]) -> dict[str, tuple[str, ...]]:
    """Return the runs again, with the steps that the full rollout's training seconds would buy each."""
    budget = training_seconds(found[f"full ({FULL})"])
    again = {}
    for name, extra in kinds().items():
        steps = round(STEPS * budget / training_seconds(found[name]) / 4) * 4
        if steps > STEPS * 1.1:
            again[f"{name}, {steps} steps"] = (*extra, f"trainer.max_steps={steps}")
    return again


def training_seconds(found: list[Result]) -> float:
    """Return the seconds of generation, scoring and training, without evaluation."""
    phases = ("generate", "score", "train")
    return mean_of([sum(r.summary["seconds_by_phase"].get(p, 0.0) for p in phases) for r in found])


def table(groups: dict[str, list[Result]]) -> list[str]:
    """Return a line per kind of run."""
    lines = [
        "| N | steps | seconds a step | greedy, each seed | mean | response tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in groups.items():
        greedy = [r.summary["accuracy_after"] for r in found]
        steps = found[0].summary["optimizer_steps"]
        lines.append(
            f"| {name} | {steps} | {training_seconds(found) / steps:.3f} | "
            f"{' / '.join(f'{100 * a:.1f}' for a in greedy)} | **{100 * mean_of(greedy):.1f}** | "
            f"{mean_of([r.summary['response_tokens'] for r in found]) / 1000:.0f} k |"
        )
    return lines


def picture(groups: dict[str, list[Result]], path: Path) -> None:
    """Draw accuracy against training seconds, a point per kind of run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for name, found in groups.items():
        x, y = training_seconds(found), mean_of([r.summary["accuracy_after"] for r in found])
        axis.plot([x], [100 * y], "o" if "steps" not in name else "^")
        axis.annotate(name, (x, 100 * y), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axis.set_xlabel("seconds of generation, scoring and training")
    axis.set_ylabel("greedy accuracy after training, %")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run, print, write the table and the picture."""
    stem, processes = f"{date.today()}_esr", int(os.environ.get("PROCESSES", "1"))
    store, seeds = RESULTS / f"{stem}.jsonl", (0, 1)
    steps = (f"trainer.max_steps={STEPS}",)
    jobs = [Job(name, s, (*COMMON, *extra, *steps)) for s in seeds for name, extra in kinds().items()]
    equal = by_name(run_all(jobs, store, processes))
    more = [Job(name, s, (*COMMON, *extra)) for s in seeds for name, extra in equal_cost(equal).items()]
    cost = by_name(run_all(more, store, processes))
    picture(equal | cost, RESULTS / f"{stem}.png")
    lines = [about("python benchmarks/esr.py"), "", "Equal steps:", "", *table(equal)]
    lines += [
        "",
        "As many steps as the full rollout's seconds buy:",
        "",
        *table(cost),
        "",
        f"![ESR]({stem}.png)",
    ]
    (RESULTS / f"{stem}_table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
