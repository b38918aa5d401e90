"""The head's Triton kernels against dense float64 formulas: the checks of the interpreter and of a GPU.

Inputs are drawn in the dtype under test and widened, so that only what a kernel rounds can differ.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from opd_lightning.functional.head import Finish
from opd_lightning.functional.head.triton_gather import gather_backward, gather_dot
from opd_lightning.functional.head.triton_rows import compare, gradient_, statistics

KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "softcap": 5.0, "scale": 1.7, "temperature": 1.3},
}
ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Largest distance of two neighbours, relative; a GPU rounds to half of it, the interpreter cuts off."""


class Case:
    """Raw logits of n rows, a finish and a number a row, on a device."""

    def __init__(self, n, v, kind="plain", dtype=torch.float32, device="cpu", seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.raw = (4 * torch.randn(n, v, generator=draw)).to(dtype).to(device)
        if n:
            self.raw[0, -1] = self.raw[0].max() + 1  # A running maximum must grow up to the last block.
        options = dict(KINDS[kind])
        if options.pop("bias", False):
            options["bias"] = torch.randn(v, generator=draw).to(dtype).to(device)
        self.finish = Finish(**options)
        self.grad_row = torch.randn(n, generator=draw).to(device)

    def logits(self):
        """What the definition says in float64, and the raw logits as its leaf."""
        leaf = self.raw.double().requires_grad_()
        z = leaf if self.finish.bias is None else leaf + self.finish.bias.double()
        z = self.finish.scale * z
        if self.finish.softcap is not None:
            z = self.finish.softcap * torch.tanh(z / self.finish.softcap)
        return z / self.finish.temperature, leaf


def near(got, expected, *, dtype=torch.float32, atol=1e-5):
    rounding = ULP[dtype] * (0.5 if got.is_cuda else 1.0)
    torch.testing.assert_close(got.double(), expected.detach(), atol=atol, rtol=1e-5 + rounding)


def check_statistics(case):
    lse, entropy = statistics(case.raw, case.finish, entropy=True)
    assert lse.dtype == entropy.dtype == torch.float32
    z, _ = case.logits()
    logp = z.log_softmax(-1)
    near(lse, z.logsumexp(-1))
    near(entropy, -(logp.exp() * logp).sum(-1))
    alone, none = statistics(case.raw, case.finish, entropy=False)
    assert alone.equal(lse)
    assert none is None


def check_gradient(case, *, entropy, columns=slice(None)):
    """Of some columns only, with the statistics of the whole rows."""
    z, leaf = case.logits()
    logp = z.log_softmax(-1)
    loss = (case.grad_row * z.logsumexp(-1)).sum()
    if entropy:
        loss = loss - (2 * case.grad_row * (logp.exp() * logp).sum(-1)).sum()
    (expected,) = torch.autograd.grad(loss, leaf)
    lse, h = statistics(case.raw, case.finish, entropy=entropy)
    bias = None if case.finish.bias is None else case.finish.bias[columns]
    part = case.raw.clone()[:, columns]
    pulls = (case.grad_row, h, 2 * case.grad_row if entropy else None)
    got = gradient_(part, replace(case.finish, bias=bias), lse, *pulls)
    assert got is part
    near(got, expected[:, columns], dtype=part.dtype, atol=3e-6)


def divergence(logs, logt, beta, scaled):
    """GKD's generalised JSD, by its definition."""
    if beta == 0:
        return (logt.exp() * (logt - logs)).sum(-1)
    if beta == 1:
        return (logs.exp() * (logs - logt)).sum(-1)
    mixture = (beta * logt.exp() + (1 - beta) * logs.exp()).log()
    of_teacher = (logt.exp() * (logt - mixture)).sum(-1)
    of_student = (logs.exp() * (logs - mixture)).sum(-1)
    return (beta * of_teacher + (1 - beta) * of_student) / (beta * (1 - beta) if scaled else 1)


def check_compare(student, teacher, beta, *, scaled=False):
    zs, leaf = student.logits()
    expected = divergence(zs.log_softmax(-1), teacher.logits()[0].log_softmax(-1), beta, scaled)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    before, theirs = student.raw.clone(), teacher.raw.clone()
    inputs = (student.raw, student.finish, teacher.raw, teacher.finish, beta, scaled)
    value = compare(*inputs, gradient=False)
    assert student.raw.equal(before)
    near(value, expected)
    assert compare(*inputs, gradient=True).equal(value)
    assert teacher.raw.equal(theirs)
    near(student.raw, expected_grad, dtype=student.raw.dtype, atol=3e-6)


def check_odd_values(device="cpu"):
    """A row with ids that are ruled out, and one with a NaN, which no kernel may hide."""
    case, teacher = Case(3, 40, device=device), Case(3, 40, device=device, seed=1)
    case.raw[0, :20] = -torch.inf
    case.raw[2, 5] = torch.nan
    lse, entropy = statistics(case.raw, case.finish, entropy=True)
    rest = case.raw[0, 20:].double()
    near(lse[0], rest.logsumexp(-1))
    near(entropy[0], torch.distributions.Categorical(logits=rest).entropy())
    assert lse.isnan().tolist() == entropy.isnan().tolist() == [False, False, True]
    for beta in (0.0, 0.5, 1.0):
        raw = case.raw.clone()
        value = compare(raw, case.finish, teacher.raw, teacher.finish, beta, False, gradient=True)
        assert value.isnan().tolist() == raw.isnan().any(-1).tolist() == [False, False, True]
    ones = torch.ones_like(lse)
    got = gradient_(case.raw, case.finish, lse, ones, entropy, ones)
    assert got.isnan().any(-1).tolist() == [False, False, True]
    assert got[0, :20].abs().max() == 0


def gathered(n, h, v, k, dtype=torch.float32, device="cpu", frequent=None, seed=0):
    """Hidden states, weight, ids (``frequent``: only so many different ones) and a gradient."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=draw).to(dtype).to(device)
    weight = torch.randn(v, h, generator=draw).to(dtype).to(device)
    ids = torch.randint(frequent or v, (n, k), generator=draw).to(device)
    return hidden, weight, ids, torch.randn(n, k, generator=draw).to(device)


def check_gather(hidden, weight, ids, grad):
    """Against index arithmetic in float64, one slot at a time."""
    wide_h, wide_w, wide_g = hidden.double(), weight.double(), grad.double()
    out = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    into_h, into_w = torch.zeros_like(wide_h), torch.zeros_like(wide_w)
    for j in range(ids.shape[1]):
        rows = wide_w[ids[:, j]]
        out[:, j] = (wide_h * rows).sum(-1)
        into_h += wide_g[:, j : j + 1] * rows
        into_w.index_add_(0, ids[:, j], wide_g[:, j : j + 1] * wide_h)
    scale = math.sqrt(hidden.shape[1])
    got = gather_dot(hidden, weight, ids)
    assert got.dtype == torch.float32
    near(got, out, atol=1e-6 * scale)
    got_h, got_w = gather_backward(grad, hidden, weight, ids, into_hidden=True, into_weight=True)
    assert (got_h.dtype, got_w.dtype) == (hidden.dtype, weight.dtype)
    near(got_h, into_h, dtype=hidden.dtype)
    near(got_w, into_w, dtype=weight.dtype, atol=1e-6 * math.sqrt(max(ids.numel(), 1)) + 1e-5)
    again = gather_backward(grad, hidden, weight, ids, into_hidden=False, into_weight=True)
    assert again[0] is None
    assert again[1].equal(got_w)
    assert gather_backward(grad, hidden, weight, ids, into_hidden=True, into_weight=False)[1] is None
