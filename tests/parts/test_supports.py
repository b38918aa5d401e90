"""Which ids a support selects, and which of them count."""

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.support.augmented import Augmented
from opd_lightning.support.full import Full
from opd_lightning.support.none import NoSupport
from opd_lightning.support.sampled import Sampled
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.support.union import Union
from opd_lightning.types import Candidates, Needs

# Two positions; the taken token is the teacher's second choice, then a choice of neither.
CANDIDATES = Candidates(
    taken=torch.tensor([[4, 7]]),
    teacher_top=torch.tensor([[[3, 4, 5], [3, 4, 5]]]),
    student_top=torch.tensor([[[4, 8, 3], [9, 5, 4]]]),
)

EXPECTED = {
    Sampled(): ([[4], [7]], [[1], [1]]),
    TeacherTopK(k=2): ([[3, 4], [3, 4]], [[1, 1], [1, 1]]),
    StudentTopK(k=2): ([[4, 8], [9, 5]], [[1, 1], [1, 1]]),
    Augmented(k=2): ([[3, 4, 4], [3, 4, 7]], [[1, 1, 0], [1, 1, 1]]),
    # 4 is there already; 5 is the teacher's third choice and hence new among two
    Union(k=2): ([[3, 4, 4, 8], [3, 4, 9, 5]], [[1, 1, 0, 1], [1, 1, 1, 1]]),
    Union(k=3): ([[3, 4, 5, 4, 8, 3], [3, 4, 5, 9, 5, 4]], [[1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0]]),
    NoSupport(): ([[], []], [[], []]),
    Full(): ([[], []], [[], []]),
}


@pytest.mark.parametrize("support", EXPECTED, ids=repr)
def test_selection(support):
    ids, valid = support(CANDIDATES)
    expected_ids, expected_valid = EXPECTED[support]
    assert ids.tolist() == [expected_ids]
    assert valid.tolist() == [[[bool(v) for v in row] for row in expected_valid]]
    assert ids.dtype == torch.long
    assert valid.dtype == torch.bool
    assert support.size in (None, ids.shape[-1])


@pytest.mark.parametrize("support", EXPECTED, ids=repr)
def test_no_id_counts_twice(support):
    """Duplicates would put an id's mass into the support twice (numerics.md section 3)."""
    draw = torch.Generator().manual_seed(0)
    many = Candidates(
        taken=torch.randint(6, (8, 9), generator=draw),
        teacher_top=torch.rand(8, 9, 6, generator=draw).argsort(-1)[..., :3],
        student_top=torch.rand(8, 9, 6, generator=draw).argsort(-1)[..., :3],
    )
    ids, valid = support(many)
    for row, kept in zip(ids.flatten(0, 1).tolist(), valid.flatten(0, 1).tolist(), strict=True):
        counted = [i for i, k in zip(row, kept, strict=True) if k]
        assert len(set(counted)) == len(counted)
        assert set(counted) == set(row)


def test_needs_and_sizes():
    assert (NoSupport().needs, NoSupport().size) == (Needs(), None)
    assert (Full().needs, Full().size) == (Needs(support=True, full=True), None)
    assert (Sampled().needs, Sampled().size) == (Needs(support=True), 1)
    assert (TeacherTopK(k=5).needs, TeacherTopK(k=5).size) == (Needs(support=True, teacher_top=5), 5)
    assert (StudentTopK(k=5).needs, StudentTopK(k=5).size) == (Needs(support=True, student_top=5), 5)
    assert (Augmented(k=5).needs, Augmented(k=5).size) == (Needs(support=True, teacher_top=5), 6)
    assert (Union(k=5).needs, Union(k=5).size) == (Needs(support=True, teacher_top=5, student_top=5), 10)


@pytest.mark.parametrize("kind", [TeacherTopK, StudentTopK, Augmented, Union])
def test_refusals(kind):
    for k in (0, -1):
        with pytest.raises(ConfigError, match=r"`support.k` must be a whole number of at least 1, got"):
            kind(k=k)
    with pytest.raises(ValueError, match="declared as needed and not collected"):
        kind(k=2)(Candidates(taken=torch.zeros(1, 1, dtype=torch.long)))
