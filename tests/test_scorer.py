"""The scorer against the model's own dense logits, in several families."""

from __future__ import annotations

import pytest
import torch
from tiny import VOCAB, random_rollout, tiny_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.errors import ConfigError
from opd_lightning.loading import FrozenScorer
from opd_lightning.scorer import Scorer, check_head
from opd_lightning.types import FullTerm, Rollout, TokenBatch, Want

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def family(name: str):
    torch.manual_seed(0)
    if name == "qwen3":
        return tiny_model()
    if name == "qwen3 untied":
        return tiny_model(tied=False)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    # Gemma 2 caps its logits: the head must know.
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0))


def dense(model, rollout: Rollout, vocab: int = VOCAB) -> torch.Tensor:
    """Return log-probs ``[batch time vocab]`` row by row, each row alone and unpadded."""
    out = torch.zeros(*rollout.ids.shape, vocab)
    for row in range(len(rollout.ids)):
        prompt = rollout.prompt.ids[row][rollout.prompt.mask[row]]
        response = rollout.ids[row][rollout.mask[row]]
        logits = model(torch.cat([prompt, response])[None]).logits[0, :, :vocab].float()
        n = len(response)
        out[row, :n] = logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) - 1 + n]
    return out


# numerics 11.29
@pytest.mark.parametrize("name", ["qwen3", "qwen3 untied", "llama", "qwen2", "gemma2"])
def test_scores_equal_dense_logits(name):
    model, rollout = family(name).eval(), random_rollout(5)
    check_head(Scorer(model), name)
    ids = torch.randint(0, VOCAB, (*rollout.ids.shape, 3))
    want = Want(taken=True, support="exact", entropy=True, top=4)
    with torch.no_grad():
        scores = Scorer(model, scratch=1344)(rollout.tokens, want, ids)
        expected = dense(model, rollout)
    mask = rollout.mask
    taken = expected.gather(-1, rollout.ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores.taken_logp[mask], taken[mask], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        scores.support_logp[mask], expected.gather(-1, ids)[mask], atol=2e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        scores.entropy[mask], -(expected.exp() * expected).sum(-1)[mask], atol=2e-5, rtol=1e-5
    )
    assert torch.equal(scores.top_ids[mask], expected.topk(4, -1).indices[mask])
    assert scores.taken_logp[~mask].abs().sum() == 0


def test_renormalised_scores_are_a_softmax_over_the_given_ids():
    model, rollout = tiny_model(), random_rollout(4)
    ids = torch.rand(*rollout.ids.shape, VOCAB).topk(5, -1).indices
    scores = Scorer(model)(rollout.tokens, Want(support="renormalised"), ids)
    expected = dense(model, rollout).gather(-1, ids).log_softmax(-1)
    assert scores.taken_logp is None
    torch.testing.assert_close(
        scores.support_logp[rollout.mask], expected[rollout.mask], atol=2e-5, rtol=1e-5
    )


# numerics 11.31
def test_full_divergence_equals_the_dense_one_and_its_gradient():
    student, teacher, rollout = tiny_model(1), tiny_model(2, hidden=40), random_rollout(4)
    hidden = Scorer(teacher)(rollout.tokens, Want(hidden=True)).hidden.detach()
    scorer = Scorer(student, scratch=576)
    scorer.set_target("teacher", Scorer(teacher.requires_grad_(False)))
    term = FullTerm("teacher", ReverseKL())
    scores = scorer(rollout.tokens, Want(full=frozenset({term})), None, {"teacher": hidden})
    s, t = dense(student, rollout), dense(teacher, rollout).detach()
    expected = (s.exp() * (s - t)).sum(-1)
    torch.testing.assert_close(scores.full[term][rollout.mask], expected[rollout.mask], atol=2e-5, rtol=1e-4)
    ours = torch.autograd.grad(scores.full[term].sum(), list(student.parameters()))
    theirs = torch.autograd.grad((expected * rollout.mask).sum(), list(student.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("target" in name for name in scorer.state_dict())


def test_the_gradient_of_a_whole_head_is_not_copied():
    """A slice's would be scattered into one of the weight's size."""
    scorer = Scorer(tiny_model(tied=False))
    assert scorer.head.weight is scorer.model.get_output_embeddings().weight
    assert Scorer(tiny_model(), vocab=40).head.vocab == 40


# numerics 11.25
def test_a_shared_vocabulary_has_no_padding_ids():
    model, rollout, shared = tiny_model(), random_rollout(3, vocab=40), 40
    with torch.no_grad():
        scores = Scorer(model, vocab=shared)(rollout.tokens, Want(taken=True, top=shared))
        expected = dense(model, rollout, shared)
    taken = expected.gather(-1, rollout.ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores.taken_logp[rollout.mask], taken[rollout.mask], atol=2e-5, rtol=1e-5)
    assert int(scores.top_ids.max()) < shared
    torch.testing.assert_close(
        scores.top_logp.exp().sum(-1)[rollout.mask], torch.ones(int(rollout.mask.sum()))
    )


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_a_shift_by_one_position_fails_the_self_check(name, shift, monkeypatch):
    """numerics 11.29: logits at t - 1 score token t; a scorer that reads its neighbour's starts no run."""
    scorer = Scorer(family(name).eval())
    check_head(scorer, "some/model")
    original = Scorer._hidden
    monkeypatch.setattr(Scorer, "_hidden", lambda self, tokens: original(self, tokens).roll(shift, 0))
    with pytest.raises(ConfigError, match="differ by"):
        check_head(scorer, "some/model")


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_of_the_scores_is_far_from_a_recompute(shift):
    """numerics 11.29: the collected scores of a teacher, against its dense logits row by row."""
    model, rollout = tiny_model(), random_rollout(8, time=12)
    with torch.no_grad():
        scores = FrozenScorer(Scorer(model))(rollout.tokens, Want(taken=True)).taken_logp
        expected = dense(model, rollout).gather(-1, rollout.ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores[rollout.mask], expected[rollout.mask], atol=2e-5, rtol=1e-5)
    assert (scores.roll(shift, -1) - expected)[rollout.mask].abs().mean() > 0.5


def test_a_head_that_does_something_unknown_is_refused():
    model = tiny_model()
    scorer = Scorer(model)
    scorer.logit_scale = 0.5  # as if the model scaled its logits and the scorer did not know
    with pytest.raises(ConfigError, match="head"):
        check_head(scorer, "some/model")


# numerics 11.24
def test_a_response_of_no_tokens_has_finite_scores_and_gradient():
    model, rollout = tiny_model(), random_rollout(2)
    tokens = TokenBatch(
        prompt_ids=rollout.prompt.ids,
        prompt_mask=rollout.prompt.mask,
        ids=rollout.ids,
        mask=torch.zeros_like(rollout.mask),
    )
    scores = Scorer(model)(tokens, Want(taken=True, entropy=True))
    scores.taken_logp.sum().backward()
    assert scores.taken_logp.abs().sum() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
