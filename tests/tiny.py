"""Tiny models and random experience, shared by the tests."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.types import Experience, Finish, Origin, Problem, PromptBatch, Rollout

VOCAB = 48


def tiny_model(seed: int = 0, *, tied: bool = True, vocab: int = VOCAB, hidden: int = 32) -> PreTrainedModel:
    """Return a random two-layer Qwen3 whose distributions are far from uniform."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config)


def random_rollout(
    rows: int, *, prompt: int = 7, time: int = 9, vocab: int = VOCAB, seed: int = 0
) -> Rollout:
    """Return responses of ragged lengths, from one token to all of ``time``."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, time + 1, (rows,), generator=random)
    prompts = torch.randint(1, prompt + 1, (rows,), generator=random)
    mask = torch.arange(time) < lengths.unsqueeze(-1)
    ids = torch.randint(0, vocab, (rows, time), generator=random)
    return Rollout(
        prompt=PromptBatch(
            ids=torch.randint(0, vocab, (rows, prompt), generator=random),
            mask=torch.arange(prompt) >= prompt - prompts.unsqueeze(-1),
            problems=tuple(Problem(index=i, messages=()) for i in range(rows)),
            seeds=tuple(range(rows)),
        ),
        ids=ids * mask,
        mask=mask,
        origin=torch.full_like(ids, Origin.STUDENT),
        horizon=torch.ones_like(mask),
        behavior_logp=torch.zeros(rows, time),
        finish=torch.full((rows,), int(Finish.EOS)),
        group=torch.arange(rows),
    )


def random_experience(
    rows: int, *, k: int = 4, vocab: int = VOCAB, seed: int = 0, **sizes: int
) -> Experience:
    """Return experience with random teacher log-probs on a random support of distinct ids; no shares yet."""
    random = torch.Generator().manual_seed(seed + 1)
    rollout = random_rollout(rows, vocab=vocab, seed=seed, **sizes)
    logp = torch.log_softmax(torch.randn(*rollout.ids.shape, vocab, generator=random), -1)
    ids = torch.rand(*rollout.ids.shape, vocab, generator=random).topk(k, -1).indices
    return Experience(
        rollout=rollout,
        share=torch.zeros(rollout.ids.shape),
        teacher_taken_logp=logp.gather(-1, rollout.ids.unsqueeze(-1)).squeeze(-1),
        support_ids=ids,
        support_valid=rollout.mask.unsqueeze(-1).expand_as(ids).clone(),
        support_teacher_logp=logp.gather(-1, ids),
    )
