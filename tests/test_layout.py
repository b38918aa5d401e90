"""Every layout of the rows gives the scores, losses and gradients of the plain one."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from test_scorer import family
from tiny import VOCAB, random_rollout, tiny_model
from transformers import Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM

from opd_lightning import layout as layouts
from opd_lightning.errors import ConfigError
from opd_lightning.layout import Rows, buckets, call_tokens, check_packed, choose
from opd_lightning.loading import FrozenScorer
from opd_lightning.scorer import Scorer
from opd_lightning.types import Rollout, TokenBatch, Want

FAMILIES = ["qwen3", "qwen3 untied", "llama", "qwen2", "gemma2"]
WANT = Want(taken=True, support="exact", entropy=True)


@pytest.fixture
def free_calls(monkeypatch):
    """Calls of a backbone that cost nothing: a group for each length."""
    monkeypatch.setitem(layouts.CALL_WORK, "cpu", 0.0)


def ragged(rollout: Rollout, prompts: list[int], responses: list[int]) -> TokenBatch:
    """Return rows of these lengths."""
    wide, long = rollout.prompt.ids.shape[1], rollout.ids.shape[1]
    shown = torch.arange(wide) >= wide - torch.tensor(prompts).unsqueeze(-1)
    mask = torch.arange(long) < torch.tensor(responses).unsqueeze(-1)
    return replace(rollout.tokens, prompt_mask=shown, mask=mask)


CASES = {
    "ragged": ([3, 7, 1, 5, 2, 7], [9, 2, 5, 1, 9, 4]),
    "some without a response": ([3, 7, 1, 5, 2, 7], [0, 2, 0, 9, 0, 1]),
    "none with a response": ([3, 7, 1, 5, 2, 7], [0, 0, 0, 0, 0, 0]),
    "one token each": ([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]),
    "one row": ([4], [6]),
    "alike": ([7, 7, 7], [9, 9, 9]),
}


def scored(model, layout: str, tokens: TokenBatch, ids: torch.Tensor):
    """Return the scores and the gradient of a loss that weighs each of them otherwise."""
    model.zero_grad()
    scores = Scorer(model, layout=layout)(tokens, WANT, ids)
    values = torch.cat(
        [scores.taken_logp.unsqueeze(-1), scores.support_logp, scores.entropy.unsqueeze(-1)], -1
    )
    weight = torch.linspace(-1, 1, values.numel()).reshape(values.shape)
    (values * weight * tokens.mask.unsqueeze(-1)).sum().backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return values.detach(), gradients


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_agree(name, case, free_calls):
    prompts, responses = CASES[case]
    model = family(name).eval()
    tokens = ragged(random_rollout(len(prompts)), prompts, responses)
    ids = torch.randint(0, VOCAB, (*tokens.ids.shape, 3))
    values, gradients = scored(model, "padded", tokens, ids)
    for layout in ("buckets", "packed", "auto"):
        got, found = scored(model, layout, tokens, ids)
        torch.testing.assert_close(got, values, atol=2e-5, rtol=1e-5)
        for mine, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_layouts_call_the_backbone_as_they_say(free_calls):
    """Shapes of the calls: rows of 6, 6, 2 and 1 tokens that predict something, the last token left out."""
    model, called = tiny_model(), []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: called.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    tokens = ragged(random_rollout(4), [2, 4, 2, 3], [5, 3, 1, 0])
    for layout, shapes in {
        "padded": [(4, 6)],
        "buckets": [(1, 1), (1, 2), (2, 6)],
        "packed": [(1, 15)],
    }.items():
        called.clear()
        Scorer(model, layout=layout)(tokens, Want(taken=True))
        assert called == shapes


def test_a_response_with_holes_is_read_in_order(free_calls):
    """Nothing writes such a mask today; the states must still be those before each token."""
    model = tiny_model()
    rollout = random_rollout(2)
    tokens = ragged(rollout, [3, 5], [9, 9])
    holes = tokens.mask.clone()
    holes[0, 2], holes[1, 0] = False, False
    tokens = replace(tokens, mask=holes)
    for row in range(2):
        there = holes[row]
        ids = torch.cat([tokens.prompt_ids[row][tokens.prompt_mask[row]], tokens.ids[row][there]])
        logits = model(ids[None]).logits[0].log_softmax(-1)
        prompt = int(tokens.prompt_mask[row].sum())
        expected = logits[prompt - 1 : -1].gather(-1, ids[prompt:, None]).squeeze(-1)
        for layout in ("padded", "buckets", "packed"):
            got = Scorer(model, layout=layout)(tokens, Want(taken=True)).taken_logp
            torch.testing.assert_close(got[row][there], expected, atol=2e-5, rtol=1e-5)


# -- the cut


def cost(lengths: list[int], groups: list[list[int]], call: float) -> float:
    return sum(len(g) * max(lengths[r] for r in g) + call for g in groups)


def test_buckets_of_known_cost():
    # Two rows of 2 and two of 10: one group costs 4 * 10 + call, two cost 2 * 2 + 2 * 10 + 2 * call.
    assert buckets([10, 2, 10, 2], 15.9) == [[1, 3], [0, 2]]
    assert buckets([10, 2, 10, 2], 16.1) == [[0, 1, 2, 3]]
    assert buckets([3, 1, 2], 0.0) == [[1], [2], [0]]
    assert buckets([3, 1, 2], float("inf")) == [[0, 1, 2]]
    assert buckets([5], 1.0) == [[0]]


def test_buckets_are_the_cheapest_of_all_partitions():
    draw = random.Random(0)
    for _ in range(40):
        lengths = [draw.randint(1, 12) for _ in range(draw.randint(1, 6))]
        call = draw.choice([0.0, 1.0, 3.5, 8.0, 30.0])
        groups = buckets(lengths, call)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        cheapest = min(
            cost(lengths, [[r for r, p in enumerate(places) if p == g] for g in set(places)], call)
            for places in itertools.product(range(len(lengths)), repeat=len(lengths))
        )
        assert cost(lengths, groups, call) == pytest.approx(cheapest)


def test_a_small_model_is_called_less_often_than_a_large_one():
    small, large = tiny_model(hidden=32), tiny_model(hidden=64)
    # Two layers; 2 * (2 * 32 * 4 * 8 + 2 * 32 * 2 * 8 + 3 * 32 * 64 + norms) weights: 9,296 a layer.
    weights = sum(p.numel() for p in small.model.layers[0].parameters())
    device = torch.device("cpu")
    found = call_tokens(small, device)
    assert found == pytest.approx(layouts.CALL_WORK["cpu"] / (2 * weights), rel=0.01)
    assert call_tokens(large, device) < found < call_tokens(small, torch.device("cuda"))


# -- the choice


def test_auto_is_buckets_but_for_flash_attention_without_a_recurrence():
    model = tiny_model()
    assert [choose(name, model) for name in layouts.LAYOUTS] == ["buckets", "padded", "buckets", "packed"]
    model.config._attn_implementation_internal = "flash_attention_2"
    assert choose("auto", model) == "packed"
    model._is_stateful = True  # said by the class, where a configuration does not name its layers
    assert choose("auto", model) == "buckets"
    model._is_stateful = False
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert choose("auto", model) == "buckets"


def test_a_recurrence_is_not_packed():
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4, initializer_range=0.5
        )
    ).eval()
    for layout in ("auto", "buckets", "padded"):
        check_packed(model, layout, "some/model")
    with pytest.raises(ConfigError, match=r"student\.layout.*some/model.*use auto"):
        check_packed(model, "packed", "some/model")


def test_a_backbone_that_takes_no_position_ids_is_not_packed():
    model = tiny_model()

    def refuse(module, args, kwargs) -> None:
        if "position_ids" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")

    model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    check_packed(model, "auto", "some/model")
    with pytest.raises(ConfigError, match=r"student\.layout.*some/model.*use auto"):
        check_packed(model, "packed", "some/model")


def test_a_sliding_window_is_packed_rightly():
    """The window counts from each sequence's own beginning, also where rows are longer than it."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, sliding_window=3,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    assert "sliding_attention" in model.config.layer_types
    check_packed(model, "packed", "some/model")
    tokens = random_rollout(6).tokens
    scores = [FrozenScorer(Scorer(model, layout=n))(tokens, Want(taken=True)) for n in ("padded", "packed")]
    torch.testing.assert_close(scores[1].taken_logp, scores[0].taken_logp, atol=2e-5, rtol=1e-5)


def test_rows_count_what_predicts_something():
    tokens = ragged(random_rollout(4), [2, 4, 2, 3], [5, 3, 1, 0])
    assert Rows.of(tokens).lengths.tolist() == [6, 6, 2, 1]
