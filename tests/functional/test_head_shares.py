"""The full divergence with a hint at each position's share of the loss: the same gradients, sooner."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from dense_head import (
    VOCAB,
    Largest,
    N,
    by_name,
    dense,
    kinds,
    make,
    parameters,
    same_gradients,
)

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.divergence import jsd, reverse_kl
from opd_lightning.functional.head import full

SHARES = {
    "as the loss has it": lambda probe: probe,
    "up to a factor": lambda probe: -3 * probe,
    "another one": lambda probe: probe.flip(0),
    "of nothing": torch.zeros_like,
}


@kinds
@pytest.mark.parametrize("divergence", [ReverseKL(), partial(jsd, beta=0.3)], ids=by_name)
@pytest.mark.parametrize("change", SHARES.values(), ids=SHARES)
def test_a_share_changes_no_gradient(options, divergence, change):
    hidden, head, _ = make(**options)
    teacher_hidden, teacher_head, _ = make(seed=5, width=3)
    probe = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = dense(teacher_hidden, teacher_head).log_softmax(-1).detach()
    expected = divergence(dense(hidden, head).log_softmax(-1), teacher)
    got = full(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        divergence,
        share=change(probe),
        scratch=10 * 8 * VOCAB * 4,
    )
    torch.testing.assert_close(got, expected)
    same_gradients(got, expected, parameters(hidden, head))
    same_gradients(0 * got, 0 * expected, parameters(hidden, head))


@pytest.mark.parametrize(("dtype", "change"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_a_share_is_another_one_beyond_rounding(dtype, change):
    hidden, head, _ = make(dtype=dtype)
    other, other_head, _ = make(seed=5, dtype=dtype)
    share, probe = torch.ones(N, dtype=dtype), torch.ones(N, dtype=dtype)
    probe[3] += change
    got = full(hidden, head, other, other_head, ReverseKL(), share=share)
    expected = full(hidden, head, other, other_head, ReverseKL())
    gradients = [torch.autograd.grad((value * probe).sum(), head.weight)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients, atol=0.01 * change, rtol=0)


@pytest.mark.parametrize("share", [1 / 3, 1e-9, 0.0])
@pytest.mark.parametrize("hinted", [True, False])
def test_a_share_of_one_among_millions_is_not_rounded_away(share, hinted):
    """float16 ends at 6e-8; a loss scale brings the gradient back to where it begins."""
    inputs = make(40, dtype=torch.float16, bias=True)[:2], make(40, dtype=torch.float16, seed=5)[:2]
    (hidden, head), (other, other_head) = inputs
    shares, loss_scale = torch.full((40,), share), 1 / share if share else 1.0
    value = full(hidden, head, other, other_head, ReverseKL(), share=shares if hinted else None)
    got = torch.autograd.grad((value * shares).sum() * loss_scale, parameters(hidden, head))
    target = dense(other.double(), replace(other_head, weight=other_head.weight.double())).log_softmax(-1)
    student = dense(hidden.double(), replace(head, weight=head.weight.double())).log_softmax(-1)
    loss = reverse_kl(student, target).sum() * (share * loss_scale)
    for a, b in zip(got, torch.autograd.grad(loss, parameters(hidden, head)), strict=True):
        torch.testing.assert_close(a, b, atol=3e-3 * b.abs().max().item(), rtol=1e-2)


@pytest.mark.parametrize("share", [None, torch.ones(N)], ids=["without", "with"])
def test_a_second_backward_pass_is_like_the_first(share):
    hidden, head, _ = make(bias=True)
    other, other_head, _ = make(seed=5)
    value = full(hidden, head, other, other_head, ReverseKL(), share=share)
    first = torch.autograd.grad(3 * value.sum(), parameters(hidden, head), retain_graph=True)
    second = torch.autograd.grad(value.sum(), parameters(hidden, head))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)


@pytest.mark.parametrize(
    ("change", "weight", "passes"),
    [("as the loss has it", 1, 0), ("of nothing", 0, 0), ("another one", 1, 3), (None, 1, 4)],
)
def test_a_share_spares_the_backward_pass_its_products(change, weight, passes):
    """That of an empty micro-batch, too, whose one row has a share of 0."""
    hidden, head, _ = make()
    probe = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = None if change is None else SHARES[change](probe)
    value = full(hidden, head, hidden.detach(), head, ReverseKL(), share=share)
    with Largest() as seen:
        torch.autograd.grad((value * weight * probe).sum(), [hidden, head.weight])
    assert seen.tiles == passes  # two heads' logits, then the head's gradient, and the hidden states'


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("divergence", [ReverseKL(), partial(jsd, beta=0.3)], ids=by_name)
def test_a_share_makes_no_gradient_where_none_is_kept(without, divergence):
    hidden, head, _ = make()
    other, other_head, _ = make(seed=5)
    expected = full(hidden, head, other, other_head, divergence)
    with without(), Largest() as seen:
        got = full(hidden, head, other, other_head, divergence, share=torch.ones(N))
    torch.testing.assert_close(got, expected.detach())
    assert seen.tiles == 2  # two heads' logits
