"""Collected experience in a checkpoint: as plain containers and tensors, and cut anew for other processes.

A checkpoint is read without executing code, so that values are taken apart into what ``torch.load`` knows to be
harmless: containers, numbers, text, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from opd_lightning.types import Experience, FullTerm, Problem, PromptBatch, Rollout
from opd_lightning.types.values import TensorValue


def packed(value: Any) -> Any:
    """Return ``value`` as plain containers with tensors on the CPU, each no larger than what it shows."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, TensorValue | Problem):
        return {f.name: packed(getattr(value, f.name)) for f in fields(value)}  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): packed(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [packed(inner) for inner in value]
    # A table's own kinds of value, such as dates, are for graders, which have seen this response already.
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def unpacked(state: Mapping[str, Any], terms: frozenset[FullTerm]) -> Experience:
    """Return the experience that :func:`packed` took apart; ``terms`` are those that the objective collects."""
    named = {repr(term): term for term in terms}
    collected = {named[name]: values for name, values in state["collected_full"].items()}
    rollout = unpacked_rollout(state["rollout"])
    return Experience(**{**state, "rollout": rollout, "collected_full": collected})


def unpacked_rollout(state: Mapping[str, Any]) -> Rollout:
    """Return the rollout that :func:`packed` took apart."""
    prompt = dict(state["prompt"])
    problems = tuple(Problem(**problem) for problem in prompt.pop("problems"))
    batch = PromptBatch(**{**prompt, "problems": problems, "seeds": tuple(prompt["seeds"])})
    return Rollout(**{**state, "prompt": batch})


Rows = TypeVar("Rows", Experience, Rollout)


def shared_out(parts: Sequence[Rows], rank: int, size: int) -> Rows:
    """Return one process's part, of ``size`` processes, of an optimizer step or collection that others wrote.

    ``parts`` are its rows by the rank that collected them. All responses to a prompt stay together,
    and prompt ``i`` of the step goes to rank ``i % size``, as when the processes collect them themselves.
    Shares in the loss were counted over the whole step and stay what they are.
    """
    if len(parts) == size:
        return parts[rank]
    groups = [part.group if isinstance(part, Rollout) else part.rollout.group for part in parts]
    prompts = [group * len(parts) + old for old, group in enumerate(groups)]
    whole, prompt = joined(parts), torch.cat(prompts)
    order = torch.argsort(prompt, stable=True)
    place = torch.unique(prompt[order], return_inverse=True)[1]
    mine, group = whole.rows(order[place % size == rank]), place[place % size == rank] // size

    rollout = replace(mine if isinstance(mine, Rollout) else mine.rollout, group=group)
    changed: Any = rollout if isinstance(mine, Rollout) else replace(mine, rollout=rollout)
    return changed


def joined(parts: Sequence[Rows]) -> Rows:
    """Return all rows as one value, padded to the longest prompt on the left and response on the right."""
    whole: Rows = _joined(list(parts), left=False)
    return whole


def _joined(values: list[Any], left: bool) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(_padded(values, left))
    if isinstance(first, TensorValue):
        prompts = isinstance(first, PromptBatch)
        names = [f.name for f in fields(first)]  # type: ignore[arg-type]
        return replace(  # type: ignore[type-var]
            first, **{name: _joined([getattr(v, name) for v in values], prompts) for name in names}
        )
    if isinstance(first, Mapping):
        return {key: _joined([value[key] for value in values], left) for key in first}
    if isinstance(first, tuple):
        return tuple(item for value in values for item in value)
    return first


def _padded(values: list[Tensor], left: bool) -> list[Tensor]:
    """Pad every axis but the first with zeros (False), which is what rows of other lengths hold there."""
    shape = [max(value.shape[axis] for value in values) for axis in range(1, values[0].dim())]
    padded = []
    for value in values:
        missing = [n - m for n, m in zip(shape, value.shape[1:], strict=True)]
        # torch's pad counts the axes from the last one, before and behind each.
        amounts = [amount for gap in reversed(missing) for amount in ((gap, 0) if left else (0, gap))]
        padded.append(torch.nn.functional.pad(value, amounts) if any(missing) else value)
    return padded
