"""The head's kernels in Triton's interpreter; :mod:`test_triton_rows` runs this in a process of its own.

The interpreter is chosen when a kernel is compiled, by a variable that other tests must not see.
"""

import kernel_checks as checks
import pytest
import torch
from kernel_checks import KINDS, Case, gathered

from opd_lightning.functional.head import triton_gather, triton_rows
from opd_lightning.functional.head.triton_rows import available, compare, gradient_, statistics

WIDE = triton_rows.BLOCK
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Narrower than a block, one block; all else is tested on a block and a rest.
widths = pytest.mark.parametrize("v", [1, 13, WIDE])


def test_available():
    assert available(torch.zeros(1))
    assert available(torch.zeros(1, dtype=torch.bfloat16))
    assert not available(torch.zeros(1, dtype=torch.float64))


@kinds
@dtypes
def test_statistics(kind, dtype):
    checks.check_statistics(Case(3, WIDE + 37, kind, dtype))


@kinds
@dtypes
def test_gradient(kind, dtype):
    checks.check_gradient(Case(3, WIDE + 37, kind, dtype), entropy=True)
    checks.check_gradient(Case(2, 57, kind, dtype), entropy=False)


@widths
def test_widths(v):
    checks.check_statistics(Case(2, v, "everything"))
    checks.check_gradient(Case(2, v, "everything"), entropy=True)
    checks.check_compare(Case(2, v, "everything"), Case(2, v, seed=1), 0.5)


@kinds
@dtypes
def test_gradient_of_a_slice_of_the_vocabulary(kind, dtype):
    case = Case(2, WIDE + 50, kind, dtype)
    checks.check_gradient(case, entropy=True, columns=slice(20, WIDE + 40))


@kinds
@dtypes
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_compare(kind, dtype, beta):
    v = WIDE // 2 + 37
    checks.check_compare(Case(2, v, kind, dtype), Case(2, v, "plain", dtype, seed=1), beta)


def test_compare_of_two_finishes():
    student, teacher = Case(2, 29), Case(2, 29, "everything", torch.bfloat16, seed=1)
    checks.check_compare(student, teacher, 0.4, scaled=True)
    same = Case(2, 29)
    value = compare(same.raw, same.finish, same.raw.clone(), same.finish, 1.0, False, gradient=True)
    assert value.abs().max() == 0
    assert same.raw.abs().max() == 0


def test_nothing():
    empty, finish = torch.zeros(0, 7), Case(1, 7).finish
    lse, entropy = statistics(empty, finish, entropy=True)
    assert lse.shape == entropy.shape == (0,)
    assert gradient_(empty, finish, lse, lse, entropy, entropy).shape == (0, 7)
    assert compare(empty, finish, empty, finish, 0.5, False, gradient=True).shape == (0,)


def test_a_forbidden_id_and_a_nan():
    checks.check_odd_values()


def test_rows_must_be_contiguous():
    with pytest.raises(ValueError, match="a row of logits must be contiguous"):
        statistics(torch.zeros(4, 3).T, Case(1, 4).finish, entropy=False)


@dtypes
@pytest.mark.parametrize(
    ("n", "h", "v", "k", "frequent"),
    [
        (2, 5, 11, 3, None),  # one piece
        (14, 70, 9, 3, None),  # ragged pieces and widths, short runs
        (12, 20, 9, 5, 2),  # runs over several pieces
        (8, 20, 9, 4, 1),  # one run; pieces end where the list does
        (3, triton_gather.BLOCK + 9, 40, triton_gather.BLOCK_K + 1, None),
    ],
)
def test_gather(n, h, v, k, frequent, dtype, monkeypatch):
    # Entries are interpreted one by one: small pieces make the same paths out of few.
    monkeypatch.setattr(triton_gather, "PIECE", 8)
    monkeypatch.setattr(triton_gather, "COLUMNS", 64)
    checks.check_gather(*gathered(n, h, v, k, dtype, frequent=frequent))


@pytest.mark.parametrize(("n", "k"), [(0, 3), (4, 0), (0, 0)])
def test_gather_of_nothing(n, k):
    hidden, weight, ids, grad = gathered(n, 6, 8, k)
    checks.check_gather(hidden, weight, ids, grad)


def test_frequent_rows_of_a_bf16_head_keep_their_gradient():
    """512 equal terms on one row: a sum in bf16 would stop growing at 256 of them."""
    hidden, weight = torch.ones(512, 3).bfloat16(), torch.zeros(2, 3).bfloat16()
    ids = torch.zeros(512, 1, dtype=torch.long)
    _, got = triton_gather.gather_backward(
        torch.ones(512, 1), hidden, weight, ids, into_hidden=False, into_weight=True
    )
    assert got.tolist() == [[512.0] * 3, [0.0] * 3]
