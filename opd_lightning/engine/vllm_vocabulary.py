"""The shared vocabulary, inside vLLM's sampler. Importing this module imports vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class SharedVocabulary(LogitsProcessor):
    """Takes every id at or above ``extra_args["vocab"]`` of a request out of its distribution."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.limits: dict[int, int] = {}

    def is_argmax_invariant(self) -> bool:
        """Return False: greedy decoding needs it too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests as they come, leave and move in the batch."""
        process_dict_updates(self.limits, batch_update, _limit)

    def apply(self, logits: Tensor) -> Tensor:
        """Return the logits ``[rows vocabulary]`` with -inf at what is not shared."""
        for limit in set(self.limits.values()):
            rows = [row for row, held in self.limits.items() if held == limit]
            if len(rows) == len(logits):
                logits[:, limit:] = -torch.inf
            else:
                logits[rows, limit:] = -torch.inf
        return logits


def _limit(params: SamplingParams, *_: Any) -> int | None:
    return (params.extra_args or {}).get("vocab")
