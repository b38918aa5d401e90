"""The head's modes against dense logits: values, gradients, memory, precision."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd_lightning.divergence.forward_kl import ForwardKL
from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.divergence import jsd, reverse_kl
from opd_lightning.functional.head import Head, exact, full, support_logits, top

N, HIDDEN, VOCAB, K = 11, 6, 13, 4


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
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


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
    "everything": {"bias": True, "softcap": 3.0, "scale": 2.0},
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
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
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


SHARES = {
    "as the loss has it": lambda probe: probe,
    "up to a factor": lambda probe: -3 * probe,
    "another one": lambda probe: probe.flip(0),
    "of nothing": torch.zeros_like,
}


@kinds
@pytest.mark.parametrize("divergence", [ReverseKL(), partial(jsd, beta=0.3)], ids=str)
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


def test_a_share_is_another_one_beyond_rounding():
    hidden, head, _ = make()
    other, other_head, _ = make(seed=5)
    share, probe = torch.ones(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    probe[3] += 1e-7
    got = full(hidden, head, other, other_head, ReverseKL(), share=share)
    expected = full(hidden, head, other, other_head, ReverseKL())
    gradients = [torch.autograd.grad((value * probe).sum(), head.weight)[0] for value in (got, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


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


@pytest.mark.parametrize(("change", "passes"), [("as the loss has it", 0), ("another one", 3), (None, 4)])
def test_a_share_spares_the_backward_pass_its_products(change, passes):
    hidden, head, _ = make()
    probe = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    share = None if change is None else SHARES[change](probe)
    value = full(hidden, head, hidden.detach(), head, ReverseKL(), share=share)
    with Largest() as seen:
        torch.autograd.grad((value * probe).sum(), [hidden, head.weight])
    assert seen.tiles == passes  # two heads' logits, then the head's gradient, and the hidden states'


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("divergence", [ReverseKL(), partial(jsd, beta=0.3)], ids=str)
def test_a_share_makes_no_gradient_where_none_is_kept(without, divergence):
    hidden, head, _ = make()
    other, other_head, _ = make(seed=5)
    expected = full(hidden, head, other, other_head, divergence)
    with without(), Largest() as seen:
        got = full(hidden, head, other, other_head, divergence, share=torch.ones(N))
    torch.testing.assert_close(got, expected.detach())
    assert seen.tiles == 2  # two heads' logits


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_ids_that_a_bias_rules_out(divergence):
    """-inf on both sides: such an id has no probability in either, and takes part in nothing."""
    hidden, head, _ = make(bias=True)
    other, other_head, _ = make(seed=5, bias=True)
    out = torch.zeros(VOCAB, dtype=torch.float64)
    out[[2, 7]] = -torch.inf
    head, other_head = replace(head, bias=head.bias + out), replace(other_head, bias=other_head.bias + out)
    kept = torch.tensor([v for v in range(VOCAB) if v not in (2, 7)])
    cut = [replace(h, weight=h.weight[kept], bias=h.bias[kept]) for h in (head, other_head)]
    got = full(hidden, head, other, other_head, divergence)
    expected = full(hidden, cut[0], other, cut[1], divergence)
    torch.testing.assert_close(got, expected)
    same_gradients(got, expected, [hidden])


@scratches
def test_ids_that_a_bias_rules_out_of_a_softmax(scratch):
    """Half the vocabulary, so that many a tile holds none that is left; entropies and gradients are finite."""
    hidden, whole, ids = make(bias=True)
    rest, ids = VOCAB // 2, ids % (VOCAB // 2)
    out = torch.zeros(VOCAB, dtype=torch.float64).index_fill(0, torch.arange(rest, VOCAB), -torch.inf)
    cut = replace(whole, weight=whole.weight[:rest], bias=whole.bias[:rest])
    head = replace(whole, bias=whole.bias + out)
    expected = torch.distributions.Categorical(logits=dense(hidden, cut))
    logp, entropy = exact(hidden, head, ids, entropy=True, scratch=scratch)
    found = top(hidden, head, 3, ids, entropy=True, scratch=scratch)
    for value, its_entropy in ((logp, entropy), (found.asked_logp, found.entropy)):
        torch.testing.assert_close(value, expected.logits.gather(-1, ids))
        torch.testing.assert_close(its_entropy, expected.entropy())
    torch.testing.assert_close(found.logp, expected.logits.topk(3).values)
    same_gradients(logp, expected.logits.gather(-1, ids), [hidden, whole.weight, whole.bias])
    same_gradients(entropy, expected.entropy(), [hidden, whole.weight, whole.bias])


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


def test_frozen_parts_get_no_gradient():
    hidden, head, ids = make()
    got = support_logits(hidden, head.detach(), ids).sum()
    (expected,) = torch.autograd.grad(dense(hidden, head).gather(-1, ids).sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(got, hidden)[0], expected)
    got = support_logits(hidden.detach(), head, ids).sum()
    (expected,) = torch.autograd.grad(dense(hidden, head).gather(-1, ids).sum(), head.weight)
    torch.testing.assert_close(torch.autograd.grad(got, head.weight)[0], expected)


@pytest.mark.parametrize("mode", ["exact", "top", "full"])
def test_logits_stay_within_the_scratch(mode):
    """Forward and backward: no tensor on the way is larger than what one buffer may be, and many are made."""
    hidden, head, ids = make(64)
    rows = 16
    scratch = 8 * rows * VOCAB * {"exact": 2, "top": 2, "full": 10}[mode]
    with Largest() as largest:
        if mode == "exact":
            result = sum(r.sum() for r in exact(hidden, head, ids, entropy=True, scratch=scratch))
        elif mode == "top":
            top(hidden.detach(), head.detach(), 3, ids, entropy=True, scratch=scratch)
        else:
            result = full(hidden, head, hidden.detach(), head, reverse_kl, scratch=scratch).sum()
        if mode != "top":
            torch.autograd.grad(result, [hidden, head.weight])
    assert largest.numel <= max(64 * HIDDEN, scratch // 8) < 64 * VOCAB * (3 if mode == "full" else 1)
    assert largest.tiles >= 64 // rows


def test_rows_of_the_head_are_not_gathered():
    hidden, head, ids = make(64)
    with Largest() as largest:
        support_logits(hidden, head, ids).sum().backward()
    assert largest.numel <= 64 * HIDDEN  # and not 64 * K * HIDDEN


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


# numerics 11.28
def test_bf16_head_against_float64():
    """Inputs are exact in bf16; only the logits are rounded, by 2^-9."""
    hidden, head, ids = make(200, dtype=torch.bfloat16)
    reference = dense(hidden.double(), replace(head, weight=head.weight.double()))
    bound = 2.0**-9 * reference.abs().max().item()
    logp = reference.log_softmax(-1)
    got, entropy = exact(hidden, head, ids, entropy=True, scratch=8192)
    assert got.dtype == entropy.dtype == torch.float32
    assert (got - logp.gather(-1, ids)).abs().max() < 2.1 * bound
    # The gathered rows are multiplied in float32 and not rounded at all.
    raw = support_logits(hidden, head, ids)
    assert raw.dtype == torch.float32
    torch.testing.assert_close(raw.double(), reference.gather(-1, ids), atol=1e-5, rtol=1e-5)
    value = full(hidden, head, hidden, head, reverse_kl, scratch=1 << 16)
    assert value.abs().max() == 0
    other, other_head, _ = make(200, seed=9, dtype=torch.bfloat16)
    value = full(hidden, head, other, other_head, reverse_kl, scratch=1 << 16)
    assert value.dtype == torch.float32
    assert value.min() > -1e-6
    for parameter in (hidden, head.weight):
        (gradient,) = torch.autograd.grad(value.sum(), parameter, retain_graph=True)
        assert gradient.dtype == torch.bfloat16
        assert gradient.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_rounded_products_still_make_a_distribution(autocast):
    """The asked logits are rounded as those in the normaliser are: no probability above 1, and 1 in all."""
    hidden, head, _ = make(200, dtype=torch.float32 if autocast else torch.bfloat16)
    ids = torch.arange(VOCAB).expand(200, -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp = exact(4 * hidden, head, ids, entropy=False).logp
        best = top(4 * hidden, head, 5, ids, entropy=False)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(200), atol=1e-5, rtol=0)
    assert torch.equal(best.asked_logp.topk(5).values, best.logp)


def test_frequent_rows_of_a_bf16_head_keep_their_gradient():
    """4096 equal terms on one row: a sum in bf16 would stop growing at 256 of them."""
    weight = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.ones(4096, 3, dtype=torch.bfloat16)
    ids = torch.zeros(4096, 1, dtype=torch.long)
    support_logits(hidden, Head(weight=weight), ids).sum().backward()
    assert weight.grad.tolist() == [[4096.0] * 3, [0.0] * 3]


def test_under_autocast():
    hidden, head, ids = make(dtype=torch.float32)
    expected = dense(hidden, head).log_softmax(-1).gather(-1, ids)
    with torch.autocast("cpu", torch.bfloat16):
        logp = exact(hidden, head, ids, entropy=False, scratch=512).logp
        raw = support_logits(hidden, head, ids)
    assert logp.dtype == raw.dtype == torch.float32
    torch.testing.assert_close(logp, expected, atol=0.1, rtol=0)
    torch.testing.assert_close(raw, dense(hidden, head).gather(-1, ids))
    gradients = torch.autograd.grad(logp.sum() + raw.sum(), [hidden, head.weight])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_autocast_leaves_a_float64_head_alone():
    hidden, head, ids = make()
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = exact(hidden, head, ids, entropy=True)
        best = top(hidden, head, 2, ids, entropy=False)
        value = full(hidden, head, hidden.flip(0).detach(), head, ReverseKL())
    expected = dense(hidden, head).log_softmax(-1)
    torch.testing.assert_close(logp, expected.gather(-1, ids))
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    torch.testing.assert_close(best.logp, expected.topk(2).values)
    torch.testing.assert_close(value, reverse_kl(expected, expected.flip(0)))


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


def test_a_compiled_caller():
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
