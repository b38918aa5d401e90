"""An estimate as text: a table for people, and one line for a run's start."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opd_lightning.planning.cost import Cost
from opd_lightning.planning.memory import KEPT, Memory
from opd_lightning.planning.run import PlannedRun
from opd_lightning.planning.settings import Assumptions

WORLDS = tuple(2**i for i in range(11))
"""Numbers of processes that a plan is compared at: 1 to 1,024."""


def short(found: Memory, cost: Cost) -> str:
    """Return memory and tokens in one line."""
    tokens = count(cost.tokens["train"])
    return f"memory about {size(found.peak)} a process, an estimate; at most {tokens} response tokens trained"


def report(
    run: PlannedRun,
    found: Memory,
    cost: Cost,
    assumed: Assumptions,
    peak_tflops: float,
    others: Sequence[tuple[int, Memory, Cost]],
) -> str:
    """Return the whole estimate with what it assumes; ``others`` is the same run on other numbers of processes."""
    blocks = [
        "An estimate from shapes and settings alone; no weight was read.",
        _models(run),
        _memory(found),
        _work(cost),
        _others(run, others),
        "assumed\n" + "\n".join(f"  {line}" for line in _assumed(run, assumed, peak_tflops)),
    ]
    return "\n\n".join(blocks)


def size(number: float) -> str:
    """Return bytes for people.

    >>> size(2.5e9), size(3.04e7), size(12.0)
    ('2.5 GB', '30.4 MB', '0.0 MB')
    """
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def count(number: float) -> str:
    """Return a count for people.

    >>> count(950), count(1.25e6), count(3e9), count(2e12)
    ('950', '1.25 M', '3 G', '2 T')
    """
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if number >= scale:
            return f"{number / (1e3 if unit == 'k' else scale):.4g} {unit}"
    return f"{number:.0f}"


def hours(number: float) -> str:
    """Return a time for people.

    >>> hours(0.5 / 3600), hours(0.25), hours(30.0)
    ('0.5 s', '15.0 min', '30.0 h')
    """
    for unit, scale in (("h", 1.0), ("min", 60.0)):
        if number * scale >= 1:
            return f"{number * scale:.1f} {unit}"
    return f"{number * 3600:.1f} s"


def _models(run: PlannedRun) -> str:
    trained = "all" if run.student.trained == run.student.weights else count(run.student.trained)
    precision = {
        "float32": "float32",
        "mixed": "half types beside float32 weights",
        "half": "half types throughout",
    }
    lines = [
        f"student    {count(run.student.weights)} weights, {trained} trained, computed in {precision[run.compute]}"
    ]
    for model in run.frozen:
        place = "" if model.copy else ", the student itself"
        place += ", waits on the CPU" if model.host else ""
        place += ", a part on each process" if model.divided else ""
        lines.append(f"{model.role:<10} {count(model.shape.weights)} weights of {model.width:g} bytes{place}")
    if not any(model.role == "teacher" for model in run.frozen):
        lines.append("teacher    elsewhere: its memory and time are not in here")
    where = f"{run.processes} on {run.nodes} node{'s' if run.nodes > 1 else ''}"
    lines.append(f"processes  {where}, strategy {run.sharding.name}")
    micro = run.accumulate if run.micro_batch_tokens is None else -(-run.step_rows // run.micro_batch_rows)
    cut = f", in {micro} micro-batches of at most {run.micro_batch_rows}" if micro > 1 else ""
    lines.append(
        f"batch      {run.step_rows} responses a process and optimizer step{cut}; {run.collection_rows} a collection"
    )
    return "\n".join(lines)


def _memory(found: Memory) -> str:
    rows = [(name, value) for name, value in found.held.items()]
    lines = [f"memory of a process: about {size(found.peak)}", "  all the time"]
    lines += [f"    {name:<22}{size(value):>10}" for name, value in rows]
    for phase, parts in found.phases.items():
        mark = ", the worst" if phase == found.worst else ""
        lines.append(f"  to {phase}: {size(sum(parts.values()))}{mark}")
        lines += [f"    {name:<22}{size(value):>10}" for name, value in parts.items() if value]
    if found.host:
        lines.append("  on the CPU, beside the GPU")
        lines += [f"    {name:<22}{size(value):>10}" for name, value in found.host.items()]
    return "\n".join(lines)


def _work(cost: Cost) -> str:
    lines = [
        f"{count(cost.prompts)} prompts and {count(cost.responses)} responses in {cost.collections} collections; "
        f"{count(cost.tokens['prompts'])} prompt tokens read with them",
        f"  {'phase':<10}{'response tokens':>17}{'operations':>14}{'time':>12}",
    ]
    for phase in ("generate", "score", "train", "evaluate"):
        lines.append(
            f"  {phase:<10}{count(cost.tokens[phase]):>17}{cost.operations[phase]:>14.3g}{hours(cost.hours[phase]):>12}"
        )
    total = sum(cost.operations.values())
    lines.append(f"  {'all':<10}{'':>17}{total:>14.3g}{hours(cost.total_hours):>12}")
    return "\n".join(lines)


def _others(run: PlannedRun, others: Sequence[tuple[int, Memory, Cost]]) -> str:
    lines = ["the same run on other numbers of processes", f"  {'processes':>9}{'memory':>12}{'time':>12}"]
    for processes, found, cost in others:
        lines.append(f"  {processes:>9}{size(found.peak):>12}{hours(cost.total_hours):>12}")
    per_step = run.prompts // run.collection_steps
    lines.append(
        f"  no others up to {WORLDS[-1]}: the {per_step} prompts of an optimizer step divide by no more of them"
    )
    return "\n".join(lines if len(others) < len(WORLDS) else lines[:-1])


def _assumed(run: PlannedRun, assumed: Assumptions, peak_tflops: float) -> list[str]:
    bound = " (collector.max_prompt_tokens, the bound)" if assumed.prompt_tokens is None else ""
    reached = ", ".join(f"{phase} {share:g}" for phase, share in assumed.utilisation.items())
    lines = [
        f"every prompt has {run.prompt_tokens} tokens{bound}, a response {run.mean:.4g} in the mean and "
        f"{run.longest} at most",
        f"a device does {peak_tflops:.4g} TFLOP/s at its peak, of which are reached: {reached} (planning.*)",
        f"libraries and the device's context take {size(run.runtime)}; what the allocator keeps beside what a run "
        f"makes is taken for {KEPT[run.device]:.0%} of that, "
        + (
            "of matrices below 32 MiB alone, by measurement"
            if run.device == "cpu"
            else "a guess: no GPU was measured"
        ),
        "in memory each response is at its longest, and so is each row of the largest micro-batch",
        "attention's matrix is not kept (sdpa or flash attention), and its arithmetic is not counted",
        "communication, loading, grading and waiting for other processes take no time",
    ]
    if run.checkpointing:
        lines.append("a second forward of each layer in the backward pass is not in the time")
    return lines


def compared(run: PlannedRun, at: Callable[[int], tuple[Memory, Cost]]) -> list[tuple[int, Memory, Cost]]:
    """Return the estimates of a run on each of :data:`WORLDS` processes that its prompts divide over."""
    per_step = run.prompts // run.collection_steps
    return [(processes, *at(processes)) for processes in WORLDS if per_step % processes == 0]
