"""The head's modes against dense logits: values and gradients."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dense_head import (
    DIVERGENCES,
    HIDDEN,
    VOCAB,
    K,
    N,
    by_name,
    dense,
    kinds,
    make,
    parameters,
    same_gradients,
    scratches,
)

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.divergence import reverse_kl
from opd_lightning.functional.head import Head, exact, full, support_logits, top


def test_known_numbers():
    # z = (1, 2); log p = z - log(e + e^2) = (-1.313262, -.313262); H = .268941*1.313262 + .731059*.313262
    head = Head(weight=torch.tensor([[1.0], [2.0]]))
    logp, entropy = exact(torch.ones(1, 1), head, torch.tensor([[0, 1]]), entropy=True, scratch=128)
    torch.testing.assert_close(logp, torch.tensor([[-1.313262, -0.313262]]))
    torch.testing.assert_close(entropy, torch.tensor([0.582203]))
    # cap(.5 * (1, 2) + .5 * (2, 0)) = 2 tanh(1.5 / 2), 2 tanh(1 / 2)
    head = replace(head, bias=torch.tensor([2.0, 0.0]), scale=0.5, softcap=2.0)
    got = support_logits(torch.ones(1, 1), head, torch.tensor([[0, 1]]))
    torch.testing.assert_close(got, torch.tensor([[1.270298, 0.924234]]))


@kinds
def test_support_logits(options):
    hidden, head, ids = make(**options)
    got = support_logits(hidden, head, ids)
    expected = dense(hidden, head).gather(-1, ids)
    torch.testing.assert_close(got, expected)
    same_gradients(got, expected, parameters(hidden, head))


@kinds
@scratches
def test_exact(options, scratch):
    hidden, head, ids = make(**options)
    got, entropy = exact(hidden, head, ids, entropy=True, scratch=scratch)
    distribution = torch.distributions.Categorical(logits=dense(hidden, head))
    expected = distribution.logits.gather(-1, ids)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(entropy, distribution.entropy())
    same_gradients(got, expected, parameters(hidden, head))
    same_gradients(entropy, distribution.entropy(), parameters(hidden, head))
    assert exact(hidden, head, ids, entropy=False, scratch=scratch).entropy is None


@kinds
@scratches
def test_top(options, scratch):
    hidden, head, ids = make(**options)
    logp = dense(hidden, head).log_softmax(-1)
    got = top(hidden, head, 5, ids, entropy=True, scratch=scratch)
    expected = logp.topk(5)
    assert got.ids.equal(expected.indices)
    torch.testing.assert_close(got.logp, expected.values)
    torch.testing.assert_close(got.asked_logp, logp.gather(-1, ids))
    torch.testing.assert_close(got.entropy, -(logp.exp() * logp).sum(-1))
    assert not got.logp.requires_grad
    nothing = top(hidden, head, 2, ids[:, :0], entropy=False, scratch=scratch)
    assert nothing.asked_logp.shape == (N, 0)
    assert nothing.entropy is None


@kinds
@scratches
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=by_name)
def test_full(options, scratch, divergence):
    hidden, head, _ = make(**options)
    teacher_hidden, teacher_head, _ = make(seed=5, width=3)
    got = full(hidden, head, teacher_hidden, teacher_head, divergence, scratch=scratch)
    teacher = dense(teacher_hidden, teacher_head).log_softmax(-1).detach()
    expected = divergence(dense(hidden, head).log_softmax(-1), teacher)
    torch.testing.assert_close(got, expected)
    same_gradients(got, expected, parameters(hidden, head))
    frozen = torch.autograd.grad(
        got.sum(), [teacher_hidden, teacher_head.weight], allow_unused=True, materialize_grads=False
    )
    assert frozen == (None, None)


def test_many_ids_are_ranked_by_blocks():
    """Large enough for two small selections in place of one; ties and a ragged end included."""
    hidden, weight = torch.randn(5, 4), torch.randn(1031, 4)
    weight[700] = weight[3]
    head = Head(weight=weight)
    got = top(hidden, head, 3, torch.zeros(5, 0, dtype=torch.long), entropy=False, scratch=1)
    expected = (hidden @ weight.T).log_softmax(-1).topk(3)
    torch.testing.assert_close(got.logp, expected.values)
    torch.testing.assert_close((hidden @ weight.T).log_softmax(-1).gather(-1, got.ids), got.logp)
    assert all(len(set(row)) == 3 for row in got.ids.tolist())


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_divergence_of_certainties(divergence, dtype):
    """Logits so far apart that most probabilities are 0 in the dtype, on one side or on both."""
    hidden, head, _ = make(dtype=dtype)
    other, other_head, _ = make(seed=5, dtype=dtype)
    near, far = 40, 4000  # some ids have no mass on both sides, then all but one have none
    for spread in (near, far):
        got = full(spread * hidden, head, spread * other, other_head, divergence)
        student, teacher = (
            dense(spread * h, w).log_softmax(-1) for h, w in ((hidden, head), (other, other_head))
        )
        expected = divergence(student, teacher.detach())
        same = (student - teacher).abs().amax(-1) < 1e4  # beyond, the plain form counts log 0 as -1e4
        torch.testing.assert_close(got[same], expected[same], atol=1e-4, rtol=1e-4)
        for gradient in torch.autograd.grad(got.sum(), [hidden, head.weight]):
            assert gradient.isfinite().all()


def test_tied_head():
    """One weight is the embedding and the head: both gradients arrive."""
    tokens = torch.tensor([1, 2, 2, 7])
    _, head, ids = make(4)
    mixing = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)

    def backbone():
        return torch.tanh(head.weight[tokens] @ mixing)

    for got, expected in (
        (support_logits(backbone(), head, ids), dense(backbone(), head).gather(-1, ids)),
        (
            exact(backbone(), head, ids, entropy=False, scratch=256).logp,
            dense(backbone(), head).log_softmax(-1).gather(-1, ids),
        ),
    ):
        same_gradients(got, expected, [head.weight])


# numerics 11.25
def test_sliced_head_is_a_smaller_vocabulary():
    """Cut before the softmax, no gradient beyond the cut."""
    hidden, head, ids = make()
    shared = replace(head, weight=head.weight[:9])
    ids = ids % 9
    got = exact(hidden, shared, ids, entropy=True, scratch=512)
    expected = dense(hidden, head)[:, :9].log_softmax(-1)
    torch.testing.assert_close(got.logp, expected.gather(-1, ids))
    (gradient,) = torch.autograd.grad(got.logp.sum() + got.entropy.sum(), head.weight)
    assert (gradient[9:] == 0).all()
    assert (gradient[:9] != 0).any()
    assert top(hidden, shared, 9, ids, entropy=False, scratch=512).ids.max() < 9


def test_more_ids_than_the_head_has():
    hidden, head, _ = make(bias=True)
    ids = torch.randint(VOCAB, (N, 2 * VOCAB), generator=torch.Generator().manual_seed(2))
    for got, expected in (
        (support_logits(hidden, head, ids), dense(hidden, head)),
        (exact(hidden, head, ids, entropy=False).logp, dense(hidden, head).log_softmax(-1)),
    ):
        torch.testing.assert_close(got, expected.gather(-1, ids))
        same_gradients(got, expected.gather(-1, ids), parameters(hidden, head))


# numerics 11.24
def test_nothing_to_score_has_a_graph():
    hidden, head, ids = make(0, bias=True)
    results = [
        support_logits(hidden, head, ids),
        *exact(hidden, head, ids, entropy=True, scratch=384),
        full(hidden, head, hidden, head, reverse_kl, scratch=512),
    ]
    assert [tuple(r.shape) for r in results] == [(0, K), (0, K), (0,), (0,)]
    for result in results:
        gradients = torch.autograd.grad(result.sum(), [hidden, head.weight], retain_graph=True)
        assert [g.abs().sum() for g in gradients] == [0, 0]
    got = top(hidden, head, 3, ids, entropy=True, scratch=384)
    assert [tuple(r.shape) for r in got] == [(0, 3), (0, 3), (0, K), (0,)]


@pytest.mark.parametrize("n", [0, N])
def test_no_ids_asked_have_a_graph(n):
    hidden, head, ids = make(n, bias=True)
    for got in (
        support_logits(hidden, head, ids[:, :0]),
        exact(hidden, head, ids[:, :0], entropy=False).logp,
    ):
        assert got.shape == (n, 0)
        gradients = torch.autograd.grad(got.sum(), parameters(hidden, head))
        assert [float(g.abs().sum()) for g in gradients] == [0, 0, 0]


def test_frozen_parts_get_no_gradient():
    hidden, head, ids = make()
    got = support_logits(hidden, head.detach(), ids).sum()
    (expected,) = torch.autograd.grad(dense(hidden, head).gather(-1, ids).sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(got, hidden)[0], expected)
    got = support_logits(hidden.detach(), head, ids).sum()
    (expected,) = torch.autograd.grad(dense(hidden, head).gather(-1, ids).sum(), head.weight)
    torch.testing.assert_close(torch.autograd.grad(got, head.weight)[0], expected)


def test_gradient_numerically():
    hidden, head, ids = make(3)

    def scored(hidden, weight):
        return support_logits(hidden, replace(head, weight=weight, softcap=3.0), ids)

    assert torch.autograd.gradcheck(scored, (hidden, head.weight))


def test_refusals():
    hidden, head, ids = make()
    with pytest.raises(ValueError, match="k must be between 0 and the vocabulary of 13"):
        top(hidden, head, 14, ids, entropy=False, scratch=512)
    for outside in (-1, VOCAB):
        wrong = torch.where(torch.arange(N * K).view(N, K) == 5, outside, ids)
        for function in (support_logits, partial(exact, entropy=False), partial(top, k=1, entropy=False)):
            with pytest.raises(IndexError, match=rf"ids must be in \[0, 13\), got .*{outside}"):
                function(hidden, head, ids=wrong)
    with pytest.raises(ValueError, match="scratch must be at least 1"):
        exact(hidden, head, ids, entropy=False, scratch=0)
    with pytest.raises(ValueError, match="cut both to the shared vocabulary"):
        full(hidden, head, hidden, replace(head, weight=head.weight[:5]), reverse_kl, scratch=512)


def test_a_compiled_caller(request):
    if request.config.getoption("jaxtyping_packages", None):
        pytest.skip("the compiler does not look through the shape checker")
    hidden, head, ids = make(bias=True)

    def loss(hidden, weight, bias):
        of, states = replace(head, weight=weight, bias=bias), torch.tanh(hidden)
        value = support_logits(states, of, ids).square().sum()
        value = value + sum(part.sum() for part in exact(states, of, ids, entropy=True))
        return value + full(states, of, hidden.detach(), head, ReverseKL(), share=torch.ones(N)).sum()

    inputs = parameters(hidden, head)
    got, expected = torch.compile(loss, backend="eager")(*inputs), loss(*inputs)
    torch.testing.assert_close(got, expected)
    same_gradients(got, expected, inputs)


def test_the_modes_through_the_kernels():
    """On a GPU Triton does the work; here its interpreter, in a process that has chosen it."""
    pytest.importorskip("triton")
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(here / "interpreted_head.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
