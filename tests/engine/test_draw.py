"""The sampler against the exact truncated distribution, written out in float64 loops."""

import math

import pytest
import torch

from opd_lightning.engine.sampling import check, draw, kept, row_uniforms
from opd_lightning.errors import ConfigError
from opd_lightning.types import Sampling

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.9, 0.0, -4.0, 1.0, 0.7])
SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_k": 1},
    {"top_k": 99},
    {"top_p": 0.8},
    {"top_p": 0.01},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.7},
    {"top_p": 0.9, "min_p": 0.3},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "vocab": 6},
]


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, vocab=None) -> list[float]:
    """The distribution that Sampling's docstring describes, one id at a time."""
    ids = list(range(len(logits)))[:vocab]
    mass = {i: math.exp(float(logits[i]) / temperature) for i in ids}
    best_first = sorted(ids, key=lambda i: -mass[i])
    if top_k:
        best_first = best_first[:top_k]
    total, reached, inside = sum(mass[i] for i in best_first), 0.0, []
    for i in best_first:
        inside.append(i)
        reached += mass[i] / total
        if reached >= top_p:
            break
    inside = [i for i in inside if mass[i] >= min_p * mass[inside[0]]]
    total = sum(mass[i] for i in inside)
    return [mass[i] / total if i in inside else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_even_grid_of_uniforms_gives_each_id_its_exact_share(settings):
    n = 20_000
    want = torch.tensor(exact(LOGITS, **settings), dtype=torch.float64)
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids, logp, top = draw(LOGITS.expand(n, -1), uniform, Sampling(max_new_tokens=1, **settings))
    count = ids.bincount(minlength=8)
    # Inverse CDF: the count of each id is n * p to within one at either border.
    assert (count - n * want).abs().max() <= 2
    assert (count[want == 0] == 0).all()
    assert torch.allclose(logp.double(), want[ids].log(), atol=1e-6)
    assert top is None


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "temperature": 1.3}], ids=str)
def test_seeded_rows_sample_the_distribution(settings):
    n = 4096
    want = torch.tensor(exact(LOGITS, **settings), dtype=torch.float64)
    for uniform in row_uniforms(range(n), 3).T:
        ids, _, _ = draw(LOGITS.expand(n, -1), uniform, Sampling(max_new_tokens=1, **settings))
        count, expected = ids.bincount(minlength=8)[want > 0], n * want[want > 0]
        # Chi-square with at most 7 degrees of freedom: 30 has a probability of 1e-4.
        assert ((count - expected) ** 2 / expected).sum() < 30


def test_greedy_is_the_largest_logit_with_log_prob_0():
    sampling = Sampling(max_new_tokens=1, temperature=0, top_p=0.5, top_ids=3)
    ids, logp, top = draw(LOGITS[None], torch.tensor([0.9]), sampling)
    assert (ids.tolist(), logp.tolist(), top.tolist()) == ([1], [0.0], [[1, 3, 6]])


def test_top_ids_are_ranked_before_truncation_and_inside_the_vocabulary():
    sampling = Sampling(max_new_tokens=1, top_k=1, top_ids=4, vocab=6)
    _, _, top = draw(LOGITS[None], torch.tensor([0.5]), sampling)
    assert top.tolist() == [[1, 3, 0, 4]]  # 6 and 7 do not exist


@pytest.mark.parametrize("uniform", [0.0, 1 - 1e-16, 1.0])
def test_the_ends_of_the_unit_interval_draw_tokens_that_have_mass(uniform):
    logits = torch.full((1, 200), -torch.inf)
    logits[0, 50:100] = torch.randn(50, generator=torch.Generator().manual_seed(0))
    ids, logp, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), Sampling(max_new_tokens=1))
    assert int(ids) == (50 if uniform == 0 else 99)
    assert torch.isfinite(logp).all()


def test_nothing_is_sorted_when_nothing_truncates(monkeypatch):
    for name in ("topk", "sort", "argsort"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("sorted"))
    assert kept(LOGITS[None], Sampling(max_new_tokens=1))[0] is None
    draw(LOGITS[None], torch.tensor([0.5]), Sampling(max_new_tokens=1, min_p=0.1))


def test_the_token_that_crosses_top_p_is_kept():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, want in ((0.4, [1, 0, 0]), (0.6, [1, 1, 0]), (0.85, [1, 1, 1])):
        _, survivors = kept(logits, Sampling(max_new_tokens=1, top_p=top_p))
        assert survivors.isfinite().int().tolist() == [want]


LARGE = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 0.8},
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 3000},
]


@pytest.mark.parametrize("settings", LARGE, ids=str)
@pytest.mark.parametrize("vocab", [4096, 5003])
def test_a_large_vocabulary_is_drawn_from_like_a_small_one(settings, vocab):
    """Blocks and partial ranking against the definition: an even grid of uniforms, the ends included."""
    n = 3000
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    want = torch.tensor(exact(logits, **settings), dtype=torch.float64)
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    uniform[0], uniform[-1] = 0.0, 1.0
    ids, logp, _ = draw(logits.expand(n, -1), uniform, Sampling(max_new_tokens=1, **settings))
    below, above = want.cumsum(0) - want, want.cumsum(0)
    assert (want[ids] > 0).all()
    assert (uniform >= below[ids] - 1e-5).all()
    assert (uniform <= above[ids] + 1e-5).all()
    torch.testing.assert_close(logp.double(), want[ids].log(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("top_k", [100, 5000])
def test_top_k_alone_drops_nothing_for_its_rarity(top_k):
    """Logits so far apart that the sum of rounded probabilities reaches 1 before the last."""
    logits = 8 * torch.randn(12, 40_001, generator=torch.Generator().manual_seed(0))
    _, survivors = kept(logits, Sampling(max_new_tokens=1, top_k=top_k))
    assert survivors.isfinite().sum(-1).tolist() == [top_k] * 12


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_k": 300, "top_p": 0.95}], ids=str)
def test_rows_are_truncated_each_on_its_own(settings):
    """Rows of very different spread, so that some are ranked to a greater depth than others."""
    spread = torch.tensor([8.0, 0.1, 2.0, 4.0]).unsqueeze(-1)
    logits = spread * torch.randn(4, 5003, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_new_tokens=1, **settings)
    ids, survivors = kept(logits, sampling)
    for row, chosen, values in zip(logits, ids, survivors, strict=True):
        want = torch.tensor(exact(row, **settings)).nonzero().flatten()
        assert chosen[values.isfinite()].tolist() == want.tolist()


def test_a_nucleus_does_not_rank_the_vocabulary(monkeypatch):
    ranked, original = [], torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda t, k, **kw: (ranked.append(t.shape[-1]), original(t, k, **kw))[1]
    )
    logits = 4 * torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    draw(logits, torch.tensor([0.1, 0.5, 0.9]), Sampling(max_new_tokens=1, top_p=0.5))
    assert ranked
    assert max(ranked) < 10_000


def test_mass_in_one_far_block_is_found():
    logits = torch.full((4, 40_000), -torch.inf)
    logits[:, 39_990] = 0.0
    ids, logp, _ = draw(logits, torch.tensor([0.0, 0.3, 0.999, 1.0]), Sampling(max_new_tokens=1))
    assert ids.tolist() == [39_990] * 4
    assert logp.tolist() == [0.0] * 4


def test_half_precision_logits_are_widened():
    ids, logp, _ = draw(LOGITS[None].bfloat16(), torch.tensor([0.5]), Sampling(max_new_tokens=1))
    want = LOGITS.bfloat16().float().log_softmax(-1)[ids]
    assert logp.dtype == torch.float32
    assert torch.allclose(logp, want, atol=1e-6)


def test_a_rows_stream_is_its_own_and_a_longer_one_starts_alike():
    alone, among = row_uniforms([7], 20), row_uniforms([1, 7, 2**62 + 5], 50)
    assert torch.equal(alone[0], among[1, :20])
    assert among.unique().numel() == among.numel()
    assert among.ge(0).all()
    assert among.lt(1).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("max_new_tokens", 0),
        ("vocab", 0),
        ("top_ids", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"`sampling.{field}` must .*; "):
        check(Sampling(**{"max_new_tokens": 4, field: value}))


def test_more_top_ids_than_tokens_are_refused():
    with pytest.raises(ConfigError, match="top_ids"):
        check(Sampling(max_new_tokens=1, top_ids=5, vocab=4))
