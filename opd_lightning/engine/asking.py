"""What is asked of a vLLM engine, wherever it runs, and what its answers become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.engine.sampling import check
from opd_lightning.engine.vllm_adapter import Drawn
from opd_lightning.errors import require
from opd_lightning.types import Finish, Generation, PromptBatch, Sampling


def check_asked(prompts: PromptBatch, sampling: Sampling) -> None:
    """Refuse what vLLM cannot draw, or would draw otherwise.

    Raises:
        ConfigError: settings out of range, or a prompt without a token.
    """
    check(sampling)
    whole = bool(prompts.mask.any(-1).all())
    require(whole, "prompts", "have at least one token each", 0, "check the chat template")
    both = sampling.min_p > 0 and sampling.top_p < 1
    # vLLM would apply min-p first, and top-p to what that leaves.
    require(
        not both, "sampling.min_p", "be 0 beside top_p < 1 with vLLM", sampling.min_p, "set one of the two"
    )
    known = sampling.temperature == 0 or 0.01 <= sampling.temperature <= 2
    remedy = "use engine=transformers for others"
    require(known, "sampling.temperature", "be 0 or in [0.01, 2] with vLLM", sampling.temperature, remedy)


def check_length(rows: Sequence[Sequence[int]], sampling: Sampling, longest: int) -> None:
    """Raise ConfigError unless every prompt fits with a whole response."""
    needed = max(map(len, rows)) + sampling.max_new_tokens
    require(
        needed <= longest,
        "engine.max_model_len",
        f"be at least {needed} for the longest prompt with its response",
        longest,
        "raise it as far as the model allows, or lower rollout.max_new_tokens or collector.max_prompt_tokens",
    )


def rankable(sampling: Sampling) -> Sampling:
    """Return the settings without ``top_ids`` where the sampler truncates: vLLM then ranks only what is left."""
    truncated = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
    return replace(sampling, top_ids=0) if truncated else sampling


def as_generation(drawn: list[Drawn], sampling: Sampling, device: torch.device) -> Generation:
    """Return responses of any length as one right-padded value on ``device``."""
    lengths = torch.tensor([len(one.ids) for one in drawn])
    longest = int(lengths.max())

    def padded(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=dtype, device=device)

    greedy = sampling.temperature == 0
    logp = padded([one.logp for one in drawn], torch.float32)
    top = None
    if sampling.top_ids:
        empty = [[0] * sampling.top_ids]
        top = torch.tensor([one.top + empty * (longest - len(one.ids)) for one in drawn], device=device)
    finish = [Finish.EOS if one.stopped else Finish.LENGTH for one in drawn]
    return Generation(
        ids=padded([one.ids for one in drawn], torch.long),
        mask=(torch.arange(longest) < lengths[:, None]).to(device),
        behavior_logp=torch.zeros_like(logp) if greedy else logp,
        finish=torch.tensor([int(f) for f in finish], device=device),
        top_ids=top,
    )
