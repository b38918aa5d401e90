"""Every part of the configuration: neither micro-batches nor ranks nor padding change the loss of a step."""

from dataclasses import fields, replace

import everything
import pytest
import torch
from tabular import World as Tables

from opd_lightning.buffer import micro_batches
from opd_lightning.world import World

PARTS = everything.LOSSES + everything.CHOICES
every = pytest.mark.parametrize("part", [part[-1] for part in PARTS])


@pytest.fixture(scope="module")
def composed():
    return everything.composed(PARTS)


@pytest.fixture
def tables():
    return Tables(4, 3)


def close(a, b, atol=1e-6):
    """Shares are float32."""
    torch.testing.assert_close(a, b, atol=atol * max(1.0, b.abs().max().item()), rtol=0)


def lost(tables, objective, scores, parts):
    """Value, metrics and gradient of a step in parts, each with its rows of the whole step's scores."""
    done = [objective.loss(scores.rows(rows), part, 0.5) for rows, part in parts]
    value = torch.stack([value for value, _ in done]).sum()
    metrics = torch.stack([torch.stack([metric.double() for metric in m.values()]) for _, m in done]).sum(0)
    return value.detach(), metrics, tables.gradient(value)


def on_ranks(objective, pieces):
    """What each rank finishes, every call of total and gather answered with the numbers of all."""
    known = []
    while True:
        calls, done = [], []
        for piece in pieces:
            asked, replies = [], iter(known)

            def ask(own, kind, asked=asked, replies=replies):
                asked.append((kind, own.clone()))
                return next(replies, own)

            world = World(
                size=len(pieces),
                total=lambda t, ask=ask: ask(t, "total"),
                gather=lambda t, ask=ask: ask(t, "gather"),
            )
            done.append(objective.finish(piece, world))
            calls.append(asked)
        if len(known) == len(calls[0]):
            return done
        numbers = [asked[len(known)][1] for asked in calls]
        together = calls[0][len(known)][0] == "total"
        known.append(torch.stack(numbers).sum(0) if together else torch.cat(numbers))


# numerics 11.23
@every
def test_micro_batches_add_up(tables, composed, part):
    """Any number of them, more than rows too, in the buffer's order."""
    objective = composed[part]
    scores, experience = everything.seen(tables, objective)
    whole = objective.finish(experience, World())
    rows = torch.arange(len(tables.ids))
    expected = lost(tables, objective, scores, [(rows, whole)])
    assert expected[2].abs().max() > 1e-6
    marked = replace(whole, rollout=replace(whole.rollout, group=rows))
    for count in (3, 7, len(rows) + 2):
        cut = [(p.rollout.group.clamp(max=len(rows) - 1), p) for p in micro_batches(marked, count)]
        scores, _ = everything.seen(tables, objective)
        for got, wanted in zip(lost(tables, objective, scores, cut), expected, strict=True):
            close(got, wanted)


# numerics 11.23
@every
def test_ranks_add_up(tables, composed, part):
    objective = composed[part]
    scores, experience = everything.seen(tables, objective)
    rows = torch.arange(len(tables.ids))
    expected = lost(tables, objective, scores, [(rows, objective.finish(experience, World()))])
    cut = rows.split([4, len(rows) - 4])
    pieces = on_ranks(objective, [experience.rows(part) for part in cut])
    scores, _ = everything.seen(tables, objective)
    for got, wanted in zip(
        lost(tables, objective, scores, list(zip(cut, pieces, strict=True))), expected, strict=True
    ):
        close(got, wanted)


# numerics 11.23
@every
def test_padding_does_not_matter(tables, composed, part):
    """Four more positions behind all responses."""
    objective = composed[part]
    scores, experience = everything.seen(tables, objective)
    rows = torch.arange(len(tables.ids))
    expected = lost(tables, objective, scores, [(rows, objective.finish(experience, World()))])
    scores, _ = everything.seen(tables, objective)
    time = tables.ids.shape[1]

    def wider(value):
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == time:
            return torch.cat([value, value.new_zeros(len(value), 4, *value.shape[2:])], 1)
        if isinstance(value, dict):
            return {key: wider(item) for key, item in value.items()}
        return value

    def padded(value):
        return replace(value, **{f.name: wider(getattr(value, f.name)) for f in fields(value)})

    longer = replace(padded(experience), rollout=padded(experience.rollout))
    assert longer.rollout.ids.shape[1] == time + 4
    done = lost(tables, objective, padded(scores), [(rows, objective.finish(longer, World()))])
    for got, wanted in zip(done, expected, strict=True):
        close(got, wanted)
