"""The head's public functions through the Triton kernels, interpreted; test_head.py runs this in its own process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_lightning.divergence.forward_kl import ForwardKL
from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.head import Head, exact, full, support_logits
from opd_lightning.functional.head.kernels import Triton, kernels

N, HIDDEN, VOCAB, K = 6, 8, 70, 5
KINDS = {"linear": {}, "everything": {"softcap": 3.0, "scale": 2.0, "temperature": 0.7}}
DTYPES = [torch.float32, torch.bfloat16]


def make(dtype, kind, width=HIDDEN, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, width, generator=draw).to(dtype).requires_grad_() for n in (N, VOCAB))
    bias = torch.randn(VOCAB, generator=draw).to(dtype).requires_grad_() if kind != "linear" else None
    return hidden, Head(weight=weight, bias=bias, **KINDS[kind])


def in_double(hidden, head):
    bias = None if head.bias is None else head.bias.double()
    wide = replace(head, weight=head.weight.double(), bias=bias)
    return wide.finish(hidden.double() @ wide.weight.T)


def same(got, expected, inputs, dtype):
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    torch.testing.assert_close(got.double(), expected, **tolerance)
    probe = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((got * probe).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((expected * probe).sum(), inputs, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(
            a, b, **(tolerance if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.1})
        )


def of(hidden, head):
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scratch", [2 * 6 * 33, 1 << 20])
def test_exact(kind, dtype, scratch):
    hidden, head = make(dtype, kind)
    ids = torch.randint(VOCAB, (N, K), generator=torch.Generator().manual_seed(1))
    assert isinstance(kernels(head.weight), Triton)
    got, entropy = exact(hidden, head, ids, entropy=True, scratch=scratch)
    logp = in_double(hidden, head).log_softmax(-1)
    same(got, logp.gather(-1, ids), of(hidden, head), dtype)
    same(entropy, -(logp.exp() * logp).sum(-1), of(hidden, head), dtype)


def test_a_likely_id_keeps_its_gradient():
    """Tiles are kept in bf16, where pull (1 - p) would be nothing as the sum of -pull p and pull."""
    hidden, head = make(torch.bfloat16, "linear")
    ids = torch.tensor([0, 11, 12, 13, 14, VOCAB - 1]).unsqueeze(-1).repeat(1, 2)
    for likely in torch.linspace(0.5, 3, 11):
        hidden = (likely * head.weight[ids[:, 0]].detach()).requires_grad_()
        raw = (hidden @ head.weight.T).detach().double()  # rounded to bf16, as the kernels' are
        pull = torch.tensor([1.0, 0.5], dtype=torch.float64).expand(N, 2)
        of_logits = torch.zeros_like(raw).scatter_add_(-1, ids, pull) - 1.5 * raw.softmax(-1)
        logp = exact(hidden, head, ids, entropy=False, scratch=2 * 6 * 33).logp
        (got,) = torch.autograd.grad((logp * pull).sum(), hidden)
        expected = of_logits @ head.weight.detach().double()
        certain = raw.softmax(-1).gather(-1, ids[:, :1]) > 1 - 1e-5  # beyond what float32 can tell from 1
        off = (got.double() - expected).norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
        assert off[~certain].lt(0.1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_support_logits(kind, dtype):
    hidden, head = make(dtype, kind)
    ids = torch.randint(VOCAB, (N, K), generator=torch.Generator().manual_seed(1))
    same(support_logits(hidden, head, ids), in_double(hidden, head).gather(-1, ids), of(hidden, head), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JSD(beta=0.3, scaled=True)], ids=str)
@pytest.mark.parametrize("hinted", [True, False])
def test_full(kind, dtype, divergence, hinted):
    hidden, head = make(dtype, kind)
    other, teacher = make(dtype, kind, width=5, seed=7)
    share = torch.rand(N) if hinted else None
    got = full(hidden, head, other, teacher, divergence, share=share, scratch=4 * 2 * 2 * VOCAB)
    target = in_double(other, teacher).log_softmax(-1).detach()
    same(got, divergence(in_double(hidden, head).log_softmax(-1), target), of(hidden, head), dtype)


def test_nothing_to_score():
    hidden, head = make(torch.float32, "everything")
    none = torch.zeros(0, K, dtype=torch.long)
    logp, entropy = exact(hidden[:0], head, none, entropy=True)
    value = full(hidden[:0], head, hidden[:0], head, ReverseKL())
    total = logp.sum() + entropy.sum() + value.sum() + support_logits(hidden[:0], head, none).sum()
    assert total == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(total, of(hidden, head)))
