"""The head's modes at their limits: memory, precision, ids that are ruled out."""

from dataclasses import replace

import pytest
import torch
from dense_head import (
    DIVERGENCES,
    HIDDEN,
    VOCAB,
    Largest,
    by_name,
    dense,
    make,
    same_gradients,
    scratches,
)

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.functional.divergence import reverse_kl
from opd_lightning.functional.head import Head, exact, full, gathered_torch, support_logits, tiles, top


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


MIB = 1 << 20


@pytest.mark.parametrize(
    ("device", "n", "vocab", "scratch", "expected"),
    [
        # What a core keeps in its cache, 2^20 logits, by at most 512 rows; less where the scratch is smaller.
        ("cpu", 4096, 151_936, 256 * MIB, (512, 2048)),
        ("cpu", 3, 151_936, 256 * MIB, (3, 151_936)),
        ("cpu", 4096, 151_936, 1 * MIB, (512, 256)),
        # All the scratch, by at most 2^14 rows; slices begin at multiples of 128.
        ("cuda", 40_000, 151_936, 256 * MIB, (16_384, 2048)),
        ("cuda", 10_000, 151_936, 256 * MIB, (10_000, 3328)),
        ("cuda", 10_000, 151_936, 1 * MIB, (10_000, 13)),
    ],
)
def test_tiles_of_known_sizes(device, n, vocab, scratch, expected):
    """Two buffers of float32."""
    given = {"scratch": scratch, "buffers": 2, "dtype": torch.float32}
    grid = tiles.tiling(n, vocab, device=torch.device(device), **given)
    assert (grid.rows, grid.columns) == expected


@pytest.mark.parametrize(
    ("device", "vocab", "scratch", "rows"),
    [
        ("cpu", 151_936, 256 * MIB, 220),  # 2^28 / (8 * 151,936)
        ("cpu", 151_936, 1024 * MIB, 256),  # more rows would be no faster
        ("cpu", 448, 256 * MIB, 2340),  # 2^20 / 448
        ("cuda", 151_936, 1024 * MIB, 883),
        ("cuda", 448, 256 * MIB, 4096),  # all that there are
        ("cpu", 151_936, 1, 1),
    ],
)
def test_whole_rows_of_known_numbers(device, vocab, scratch, rows):
    given = {"scratch": scratch, "buffers": 2, "dtype": torch.float32}
    assert tiles.whole_rows(4096, vocab, device=torch.device(device), **given).rows == rows


@pytest.mark.parametrize("trained", [(), ("hidden",), ("weight",), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize(("mode", "logits"), [("exact", 1), ("full", 2), ("hinted", 2)])
def test_what_is_frozen_costs_no_product(mode, logits, trained):
    """Logits in the forward pass and again in the backward one, and one product for each gradient that is asked."""
    hidden, head, ids = make()
    target, frozen = hidden.detach(), head.detach()
    hidden, head = hidden if "hidden" in trained else target, head if "weight" in trained else frozen
    share = torch.ones(len(target), dtype=torch.float64) if mode == "hinted" else None
    with Largest() as seen:
        if mode == "exact":
            value = sum(part.sum() for part in exact(hidden, head, ids, entropy=True))
        else:
            value = full(hidden, head, target, frozen, ReverseKL(), share=share).sum()
        if trained:
            value.backward()
    passes = 2 if trained and mode != "hinted" else 1
    assert seen.tiles == passes * logits + len(trained)


def test_rows_of_the_head_are_not_gathered():
    hidden, head, ids = make(64)
    with Largest() as largest:
        support_logits(hidden, head, ids).sum().backward()
    assert largest.numel <= 64 * HIDDEN  # and not 64 * K * HIDDEN


def test_rows_of_a_bf16_head_are_gathered_in_blocks(monkeypatch):
    """There is no sparse product in bf16."""
    monkeypatch.setattr(gathered_torch, "_BLOCK", 8 * 3 * HIDDEN)
    hidden, head, ids = make(64, dtype=torch.bfloat16)
    with Largest() as largest:
        support_logits(hidden, head, ids).sum().backward()
    assert largest.numel <= 64 * HIDDEN


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
    assert (logp - expected).abs().max() > 1e-3  # products in bf16, as autocast's are
    torch.testing.assert_close(raw, dense(hidden, head).gather(-1, ids))
    gradients = torch.autograd.grad(logp.sum() + raw.sum(), [hidden, head.weight])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("states", "rows"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_hidden_states_and_head_of_two_precisions(states, rows):
    """As under autocast, or with adapters on a bf16 model: each input's gradient comes in its own dtype."""
    whole, reference, ids = make()
    hidden = whole.detach().to(getattr(torch, states)).requires_grad_()
    head = replace(reference, weight=reference.weight.detach().to(getattr(torch, rows)).requires_grad_())
    logits = dense(whole, reference)
    for got, expected in (
        (support_logits(hidden, head, ids), logits.gather(-1, ids)),
        (exact(hidden, head, ids, entropy=False).logp, logits.log_softmax(-1).gather(-1, ids)),
    ):
        torch.testing.assert_close(got.double(), expected, atol=0.05, rtol=0.02)
        found = torch.autograd.grad(got.sum(), [hidden, head.weight])
        assert [g.dtype for g in found] == [hidden.dtype, head.weight.dtype]
        for mine, theirs in zip(
            found,
            torch.autograd.grad(expected.sum(), [whole, reference.weight], retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine.double(), theirs, atol=0.1, rtol=0.05)


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


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=by_name)
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


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=by_name)
def test_ids_that_one_sides_bias_rules_out(divergence, side):
    """The other's mass there counts as the plain form has it, log 0 as -1e4: large and not 1e20."""
    pair = [make(bias=True)[:2], make(seed=5, bias=True)[:2]]
    out = torch.zeros(VOCAB, dtype=torch.float64).index_fill(0, torch.tensor([2, 7]), -torch.inf)
    i = ["student", "teacher"].index(side)
    hidden, whole = pair[i]
    pair[i] = hidden, replace(whole, bias=whole.bias + out)
    (hidden, head), (other, other_head) = pair
    got = full(hidden, head, other, other_head, divergence)
    student, teacher = (dense(h, w).log_softmax(-1) for h, w in pair)
    expected = divergence(student, teacher.detach())
    torch.testing.assert_close(got, expected)
    same_gradients(got, expected, [hidden, head.weight])


@scratches
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_ids_that_a_bias_rules_out_of_a_softmax(scratch, scale):
    """Half the vocabulary, so that many a tile holds none that is left; entropies and gradients are finite."""
    hidden, whole, ids = make(bias=True, scale=scale)
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


def test_small_tiles_of_a_bf16_head_lose_nothing():
    """512 + 8 times 1 stays 512 in bf16, and a sum of 1/600 stays at a half."""
    weight = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    rows, blocks = 512, 9
    hidden, ids = torch.ones(blocks * rows, 3).bfloat16(), torch.zeros(blocks * rows, 1, dtype=torch.long)
    pull = torch.zeros(blocks, rows)
    pull[:, 0] = torch.tensor([1024.0] + 8 * [2.0])
    logp = exact(hidden, Head(weight=weight), ids, entropy=False, scratch=4 * rows * 2).logp
    (logp.flatten() * pull.flatten()).sum().backward()
    assert weight.grad.tolist() == [[520.0] * 3, [-520.0] * 3]
    hidden, ids = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True), torch.tensor([[599]])
    head = Head(weight=torch.ones(600, 1, dtype=torch.bfloat16))
    exact(hidden, head, ids, entropy=False, scratch=4).logp.sum().backward()
    assert hidden.grad.abs().max() < 0.01
