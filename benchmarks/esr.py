"""Does stopping early pay? Cost per step and accuracy against N, fixed and growing, up to the full rollout.

python benchmarks/esr.py              # the built-in task
python benchmarks/esr.py long         # its longest problems, on which an untrained student drifts further
SEEDS=0,1,2 python benchmarks/esr.py  # more than one seed
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from trials import RESULTS, Job, Result, about, by_name, mean_of, run_all

STEPS = 120
START = "4 steps"  # a run that hardly trains: what the others spend on all else
COMMON = (
    *("task.seed=2026", "scheduler.warmup_steps=10", "estimator=topk", "support=teacher"),
    *(
        "evaluation.every_steps=null",
        "evaluation.settings.samples=0",
        "rollout.temperature=1.0",
        "rollout.top_p=1.0",
    ),
)


@dataclass(frozen=True)
class Setting:
    """A task, its full length in tokens, the fixed N to try and the N of a jump at half the run."""

    full: int
    fixed: tuple[int, ...]
    first: int
    task: tuple[str, ...] = ()

    @property
    def whole(self) -> str:
        """The full rollout's name."""
        return f"full ({self.full})"

    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Return the runs: N fixed, N growing, and the full rollout as the last point."""
        linear = f"{{_target_: opd_lightning.schedule.Linear, start: 16, end: {self.full}}}"
        step = f"{{_target_: opd_lightning.schedule.Step, before: {self.first}, after: {self.full}, at: 0.5}}"
        fixed = {f"N={n}": ("rollout=esr", f"rollout.max_new_tokens={n}") for n in self.fixed}
        whole = f"rollout.max_new_tokens={self.full}"
        return fixed | {
            f"N grows 16 to {self.full}": ("rollout=esr", f"rollout.max_new_tokens={linear}"),
            f"N {self.first}, then {self.full}": ("rollout=esr", f"rollout.max_new_tokens={step}"),
            "loss grows, generation full": (
                *("rollout=esr_progressive", whole, f"rollout.loss_horizon={linear}"),
            ),
            self.whole: ("rollout=top_p", whole),
        }


SETTINGS = {
    "": Setting(full=128, fixed=(32, 48, 64, 96), first=48),
    "long": Setting(
        full=192,
        fixed=(64, 96, 128),
        first=96,
        task=("task.min_steps=6", "task.max_steps=8", "evaluation.settings.max_new_tokens=192"),
    ),
}


def equal_cost(setting: Setting, found: dict[str, list[Result]]) -> dict[str, tuple[str, ...]]:
    """Return the runs that gained again, with the steps that the full rollout's CPU seconds would buy each."""
    budget = per_step(found[setting.whole], found[START])
    again = {}
    for name, extra in setting.kinds().items():
        steps = round(STEPS * budget / per_step(found[name], found[START]) / 4) * 4
        gained = mean_of([r.summary["accuracy_after"] - r.summary["accuracy_before"] for r in found[name]])
        if steps > STEPS * 1.1 and gained > 0:
            again[f"{name}, {steps} steps"] = (*extra, f"trainer.max_steps={steps}")
    return again


def per_step(found: list[Result], start: list[Result]) -> float:
    """Return the CPU seconds of an optimizer step, generation and scoring included.

    What a run takes less what one of a few steps takes, which is imports, loading and two evaluations.
    """
    seconds = mean_of([r.cpu_seconds for r in found]) - mean_of([r.cpu_seconds for r in start])
    return seconds / (found[0].summary["optimizer_steps"] - start[0].summary["optimizer_steps"])


def table(groups: dict[str, list[Result]], start: list[Result]) -> list[str]:
    """Return a line per kind of run."""
    lines = [
        "| N | steps | CPU ms a step | greedy, each seed | mean | response tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in groups.items():
        greedy = [r.summary["accuracy_after"] for r in found]
        lines.append(
            f"| {name} | {found[0].summary['optimizer_steps']} | {1000 * per_step(found, start):.0f} | "
            f"{' / '.join(f'{100 * a:.1f}' for a in greedy)} | **{100 * mean_of(greedy):.1f}** | "
            f"{mean_of([r.summary['response_tokens'] for r in found]) / 1000:.0f} k |"
        )
    return lines


def picture(
    setting: Setting, equal: dict[str, list[Result]], cost: dict[str, list[Result]], path: Path
) -> None:
    """Draw cost against N, and accuracy against N at equal steps and at equal cost, the full rollout last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def accuracy(found: list[Result]) -> float:
        return 100 * mean_of([r.summary["accuracy_after"] for r in found])

    def longer(name: str) -> list[Result]:
        return next((found for long, found in cost.items() if long.startswith(f"{name}, ")), equal[name])

    figure, (price, steps, seconds) = pyplot.subplots(1, 3, figsize=(14, 4))
    fixed = [*(f"N={n}" for n in setting.fixed), setting.whole]
    lengths = [*setting.fixed, setting.full]
    price.plot(lengths, [1000 * per_step(equal[name], equal[START]) for name in fixed], "o-")
    price.set(title="cost of a step", ylabel="CPU ms", xlabel="N")
    for axis, chosen in ((steps, equal.__getitem__), (seconds, longer)):
        axis.plot(lengths, [accuracy(chosen(name)) for name in fixed], "o-", label="N fixed")
        for i, name in enumerate(name for name in setting.kinds() if name not in fixed):
            axis.axhline(accuracy(chosen(name)), color=f"C{i + 1}", ls="--", label=name)
        axis.set(xlabel="N", ylabel="greedy accuracy after training, %", ylim=(0, 100))
    steps.set_title(f"{STEPS} steps each")
    seconds.set_title("as many steps as the full rollout's cost buys")
    steps.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run, print, write the table and the picture."""
    mode = next((word for word in sys.argv[1:]), "")
    setting, command = SETTINGS[mode], " ".join(["python benchmarks/esr.py", *sys.argv[1:]])
    stem = "_".join(filter(None, [str(date.today()), "esr", mode]))
    store, processes = RESULTS / f"{stem}.jsonl", int(os.environ.get("PROCESSES", "1"))
    seeds = [int(seed) for seed in os.environ.get("SEEDS", "0").split(",")]
    common, steps = (*COMMON, *setting.task), (f"trainer.max_steps={STEPS}",)
    kinds = setting.kinds().items()
    jobs = [Job(name, seed, (*common, *extra, *steps)) for seed in seeds for name, extra in kinds]
    jobs.append(Job(START, 0, (*common, *setting.kinds()[setting.whole], "trainer.max_steps=4")))
    equal = by_name(run_all(jobs, store, processes))
    again = equal_cost(setting, equal).items()
    more = [Job(name, seed, (*common, *extra)) for seed in seeds for name, extra in again]
    cost = by_name(run_all(more, store, processes))
    picture(setting, equal, cost, RESULTS / f"{stem}.png")
    lines = [
        about(command, [r for found in (equal | cost).values() for r in found]),
        "",
        "Equal steps:",
        "",
        *table({name: equal[name] for name in setting.kinds()}, equal[START]),
    ]
    lines += [
        "",
        "As many steps as the full rollout's CPU seconds buy:",
        "",
        *table(cost, equal[START]),
        "",
        f"![ESR]({stem}.png)",
    ]
    (RESULTS / f"{stem}_table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
