"""The head's Triton kernels on a GPU, at the sizes of real models, and the three modes with and without them."""

import kernel_checks as checks
import pytest
import torch
from kernel_checks import KINDS, Case, gathered

from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.head import Head, exact, full, support_logits
from opd_lightning.functional.head.triton_gather import gather_backward, gather_dot
from opd_lightning.functional.head.triton_rows import available, compare, gradient_, statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCAB, CUDA = 151_936, "cuda"
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Of a real model; one that no wide read fits; narrower than a block.
widths = pytest.mark.parametrize("v", [VOCAB, 50_257, 13])


def test_available():
    assert available(torch.zeros(1, device=CUDA))
    assert not available(torch.zeros(1, device=CUDA, dtype=torch.float64))
    assert not available(torch.zeros(1))


@kinds
@dtypes
@widths
def test_statistics_and_gradient(kind, dtype, v):
    case = Case(37, v, kind, dtype, CUDA)
    checks.check_statistics(case)
    checks.check_gradient(case, entropy=True)
    checks.check_gradient(case, entropy=False)
    checks.check_gradient(case, entropy=True, columns=slice(v // 3, v))


@kinds
@dtypes
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_compare(kind, dtype, beta):
    student, teacher = Case(19, VOCAB, kind, dtype, CUDA), Case(19, VOCAB, "plain", dtype, CUDA, seed=1)
    checks.check_compare(student, teacher, beta, scaled=beta == 0.3)


def test_a_forbidden_id_and_a_nan():
    checks.check_odd_values(CUDA)


def test_nothing():
    empty, finish = torch.zeros(0, 7, device=CUDA), Case(1, 7).finish
    lse, entropy = statistics(empty, finish, entropy=True)
    assert gradient_(empty, finish, lse, lse, entropy, entropy).shape == (0, 7)
    assert compare(empty, finish, empty, finish, 0.5, False, gradient=True).shape == (0,)
    for n, k in ((0, 3), (4, 0)):
        checks.check_gather(*gathered(n, 6, 8, k, device=CUDA))


def test_offsets_beyond_32_bits():
    n, last = (1 << 31) // VOCAB + 3, 2
    raw = torch.zeros(n, VOCAB, dtype=torch.bfloat16, device=CUDA)
    tail = Case(last, VOCAB, "plain", torch.bfloat16, CUDA)
    raw[-last:] = tail.raw
    lse, entropy = statistics(raw, tail.finish, entropy=True)
    expected = statistics(tail.raw, tail.finish, entropy=True)
    for got, alone in zip((lse, entropy), expected, strict=True):
        assert got[-last:].equal(alone)
    gradient_(raw, tail.finish, lse, lse, entropy, lse)
    gradient_(tail.raw, tail.finish, *(x[-last:] for x in (lse, lse, entropy, lse)))
    assert raw[-last:].equal(tail.raw)


@dtypes
@pytest.mark.parametrize(
    ("n", "h", "k", "frequent"),
    [(1024, 2048, 64, None), (700, 896, 33, 40), (4096, 101, 5, 1), (1, 64, 1, 1)],
)
def test_gather(n, h, k, frequent, dtype):
    checks.check_gather(*gathered(n, h, VOCAB, k, dtype, CUDA, frequent=frequent))


def test_gather_is_deterministic():
    hidden, weight, ids, grad = gathered(8192, 512, VOCAB, 64, torch.bfloat16, CUDA, frequent=500)
    runs = [gather_backward(grad, hidden, weight, ids, into_hidden=True, into_weight=True) for _ in range(3)]
    assert all(a.equal(b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    assert gather_dot(hidden, weight, ids).equal(gather_dot(hidden, weight, ids))


def both_ways(monkeypatch, function, *parameters):
    """Values and gradients of ``function`` with the kernels and with torch alone."""
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv("OPD_TRITON", switch)
        out = function()
        probe = torch.linspace(-1, 1, out.numel(), device=CUDA).view_as(out)
        found.append((out.detach(), *torch.autograd.grad((out * probe).sum(), parameters)))
    return zip(*found, strict=True)


@dtypes
@pytest.mark.parametrize("mode", ["support", "exact", "entropy", "reverse_kl", "jsd"])
def test_modes_with_and_without_kernels(monkeypatch, mode, dtype):
    draw = torch.Generator(CUDA).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=draw, device=CUDA).to(dtype)

    n, width = 300, 256
    hidden, weight = random(n, width).requires_grad_(), (random(VOCAB, width) / 8).requires_grad_()
    head, ids = Head(weight=weight, softcap=30.0), torch.randint(VOCAB, (n, 9), device=CUDA, generator=draw)
    target, teacher = random(n, width), Head(weight=random(VOCAB, width) / 8)
    run = {
        "support": lambda: support_logits(hidden, head, ids),
        "exact": lambda: exact(hidden, head, ids, entropy=False).logp,
        "entropy": lambda: exact(hidden, head, ids, entropy=True).entropy,
        "reverse_kl": lambda: full(hidden, head, target, teacher, ReverseKL()),
        "jsd": lambda: full(hidden, head, target, teacher, JSD(beta=0.3)),
    }[mode]
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    for kernels, plain in both_ways(monkeypatch, run, hidden, weight):
        scale = plain.double().square().mean().sqrt()
        assert (kernels.double() - plain.double()).square().mean().sqrt() <= tolerance * scale
