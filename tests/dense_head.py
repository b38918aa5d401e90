"""The head's modes against dense logits in float64: what their tests share."""

import re
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd_lightning.divergence.forward_kl import ForwardKL
from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.divergence import jsd
from opd_lightning.functional.head import Head

N, HIDDEN, VOCAB, K = 11, 6, 13, 4


def by_name(value) -> str:
    """A test's name for a divergence, the same in every process."""
    return re.sub(r" at 0x\w+", "", str(value))


def make(n=N, seed=0, dtype=torch.float64, width=HIDDEN, **options):
    """Hidden states, a head and asked ids (with repeats), with gradient."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    if options.pop("bias", False):
        options["bias"] = torch.randn(VOCAB, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    ids = torch.randint(VOCAB, (n, K), generator=draw)
    return hidden, Head(weight=weight, **options), ids


def dense(hidden, head):
    """All logits at once, by the definition."""
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    capped = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    return capped / head.temperature


def parameters(hidden, head):
    return [hidden, head.weight, *([] if head.bias is None else [head.bias])]


def same_gradients(got, expected, over):
    probe = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad((got * probe).sum(), over, retain_graph=True),
        torch.autograd.grad((expected * probe).sum(), over, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


KINDS = {
    "linear": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "everything": {"bias": True, "softcap": 3.0, "scale": 2.0, "temperature": 0.7},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
DIVERGENCES = [
    partial(jsd, beta=0.3),  # by autograd; the others in closed form
    ReverseKL(),
    ForwardKL(),
    JSD(beta=0.3),
    JSD(beta=0.9, scaled=True),
]
scratches = pytest.mark.parametrize("scratch", [1, 16 * 5, 16 * 40, 10 * 8 * VOCAB * 4, 1 << 20])
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default}


class Largest(TorchDispatchMode):
    """Watches the size of every tensor that an operation makes, and counts matrix products."""

    numel, tiles = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tiles += func in PRODUCTS
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor) and made.layout is torch.strided:
                self.numel = max(self.numel, made.numel())
        return out
