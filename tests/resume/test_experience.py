"""Experience through a checkpoint, and from one number of processes to another."""

import io
from dataclasses import fields

import pytest
import torch

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.resume.experience import joined, packed, shared_out, unpacked
from opd_lightning.types import Experience, FullTerm, Problem, PromptBatch, Rollout

TERM = FullTerm("teacher", ReverseKL())


def experience(prompts, samples=2, time=5, width=4, k=3, rank=0, size=1, seed=0) -> Experience:
    """Rows of this rank's prompts out of all, ``prompt`` numbers in the seeds and problems."""
    generator = torch.Generator().manual_seed(seed + 100 * rank)
    mine = [p for p in range(prompts) if p % size == rank for _ in range(samples)]
    rows = len(mine)
    lengths = torch.randint(1, time + 1, (rows,), generator=generator)
    mask = torch.arange(time) < lengths.unsqueeze(-1)
    noise = torch.rand(rows, time, generator=generator) * mask
    return Experience(
        rollout=Rollout(
            prompt=PromptBatch(
                ids=torch.randint(9, (rows, width), generator=generator),
                mask=torch.ones(rows, width, dtype=torch.bool),
                problems=tuple(
                    Problem(index=p, messages=({"role": "user", "content": str(p)},), answer=str(p))
                    for p in mine
                ),
                seeds=tuple(10 * p for p in mine),
            ),
            ids=torch.randint(9, (rows, time), generator=generator) * mask,
            mask=mask,
            origin=torch.zeros(rows, time, dtype=torch.long),
            horizon=mask.clone(),
            behavior_logp=-noise,
            finish=torch.zeros(rows, dtype=torch.long),
            group=torch.tensor([p // size for p in mine]),
            version=7,
        ),
        share=noise,
        progress=0.25,
        support_ids=torch.randint(9, (rows, time, k), generator=generator),
        collected_full={TERM: noise},
        extras={"gate": noise > 0.5},
        reward=torch.tensor([float(p) for p in mine]),
    )


def facts(part: Experience) -> list[tuple]:
    """Each row without its padding."""
    rows = []
    for i, problem in enumerate(part.rollout.prompt.problems):
        n, p = int(part.rollout.mask[i].sum()), int(part.rollout.prompt.mask[i].sum())
        rows.append(
            (
                problem.index,
                problem.answer,
                part.rollout.prompt.seeds[i],
                part.rollout.prompt.ids[i, -p:].tolist(),
                part.rollout.ids[i, :n].tolist(),
                part.share[i, :n].tolist(),
                part.support_ids[i, :n].tolist(),
                part.collected_full[TERM][i, :n].tolist(),
                part.extras["gate"][i, :n].tolist(),
                float(part.reward[i]),
            )
        )
    return rows


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if hasattr(a, "__dataclass_fields__") and not isinstance(a, Problem):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and list(a) == list(b) if isinstance(a, tuple | list) else a == b


def test_through_a_file_nothing_is_lost():
    before = experience(3)
    file = io.BytesIO()
    torch.save(packed(before), file)
    file.seek(0)
    after = unpacked(torch.load(file, weights_only=True), frozenset({TERM}))
    assert after.rollout.version == 7
    assert after.progress == 0.25
    for name in [f.name for f in fields(Experience) if f.name != "rollout"]:
        assert equal(getattr(before, name), getattr(after, name)), name
    for name in [f.name for f in fields(Rollout) if f.name != "prompt"]:
        assert equal(getattr(before.rollout, name), getattr(after.rollout, name)), name
    assert facts(before) == facts(after)


def test_a_slice_takes_no_more_room_than_it_shows():
    part = experience(8).rows(slice(0, 2))
    assert packed(part)["share"].untyped_storage().nbytes() == 2 * 5 * 4


def test_values_of_a_table_s_own_kind_become_text():
    import datetime

    problem = Problem(index=0, messages=(), extra={"when": datetime.date(2026, 1, 2), "n": 3})
    assert packed(problem)["extra"] == {"when": "2026-01-02", "n": 3}


def test_as_many_processes_get_their_own():
    parts = [experience(6, rank=rank, size=2) for rank in (0, 1)]
    assert shared_out(parts, 1, 2) is parts[1]


@pytest.mark.parametrize("size", [1, 3, 4])
def test_another_number_of_processes(size):
    """From two to others: every row once, a prompt's rows together, prompt i at rank i % size."""
    parts = [
        experience(6, rank=0, size=2, time=5, width=4),
        experience(6, rank=1, size=2, time=7, width=3),
    ]
    shares = [shared_out(parts, rank, size) for rank in range(size)]
    want = sorted(row for part in parts for row in facts(part))
    assert sorted(row for share in shares for row in facts(share)) == want
    for rank, share in enumerate(shares):
        assert {row[0] % size for row in facts(share)} <= {rank}
        assert [row[0] for row in facts(share)] == sorted(row[0] for row in facts(share))
        groups = share.rollout.group.tolist()
        assert groups == [row[0] // size for row in facts(share)]
    total = sum(float(share.share.sum()) for share in shares)
    assert total == pytest.approx(sum(float(part.share.sum()) for part in parts))


def test_padding_is_on_the_right_side():
    whole = joined([experience(1, width=4, time=3), experience(1, width=2, time=6)])
    assert whole.rollout.prompt.mask[2:].tolist() == [[False, False, True, True]] * 2
    assert not whole.rollout.mask[:2, 3:].any()
