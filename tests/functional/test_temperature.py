"""The scoring temperature: softmax(z / tau) in every mode of the head, for the student and the teacher alike."""

from dataclasses import replace

import pytest
import torch

from opd_lightning.functional.divergence import reverse_kl
from opd_lightning.functional.head import Head, exact, full, support_logits, top


def make(width, seed):
    """Hidden states of 11 positions (with gradient) and a capped head with a bias over 13 ids."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(s, generator=draw).double() for s in ((11, width), (13, width), (13,))
    )
    return hidden.requires_grad_(), Head(weight=weight, bias=bias, softcap=3.0)


def dense(hidden, head):
    return 3.0 * torch.tanh((hidden @ head.weight.T + head.bias) / 3.0)


# numerics 11.17
@pytest.mark.parametrize("tau", [0.5, 3.0])
def test_temperature_divides_logits_and_gradients(tau):
    """softmax(z / tau) in every mode: gradients are 1/tau times those at logits z / tau; 0 between equal models."""
    hidden, head = make(6, 0)
    ids = torch.arange(44).reshape(11, 4) % 13
    warm, cooled = replace(head, temperature=tau), dense(hidden, head).detach() / tau
    cooled.requires_grad_()
    other, other_head = make(3, 5)
    teacher = (dense(other, other_head) / tau).log_softmax(-1).detach()
    logp, entropy = exact(hidden, warm, ids, entropy=True, scratch=512)
    ours = {
        "support": support_logits(hidden, warm, ids),
        "exact": logp,
        "entropy": entropy,
        "full": full(hidden, warm, other, replace(other_head, temperature=tau), reverse_kl, scratch=512),
    }
    distribution = cooled.log_softmax(-1)
    theirs = {
        "support": cooled.gather(-1, ids),
        "exact": distribution.gather(-1, ids),
        "entropy": -(distribution.exp() * distribution).sum(-1),
        "full": reverse_kl(distribution, teacher),
    }
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected)
        (into_logits,) = torch.autograd.grad(expected.sum(), cooled, retain_graph=True)
        (wanted,) = torch.autograd.grad(
            dense(hidden, head), hidden, into_logits / tau, retain_graph=True
        )  # z / tau by the chain rule
        (got,) = torch.autograd.grad(ours[name].sum(), hidden, retain_graph=True)
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(
        top(hidden, warm, 5, ids, entropy=False, scratch=512).logp, distribution.topk(5).values
    )
    assert full(hidden, warm, hidden, warm, reverse_kl, scratch=512).abs().max() == 0
    assert full(hidden, warm, hidden, head, reverse_kl, scratch=512).abs().max() > 1e-3
