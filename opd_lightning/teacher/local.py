"""A frozen causal language model in this process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from opd_lightning.models import load_model
from opd_lightning.scorer import Scorer, check_head
from opd_lightning.types import Scores, TokenBatch, Want


@dataclass(frozen=True, kw_only=True)
class LocalTeacher:
    """Names a teacher that transformers can load, by folder or hub name.

    Args:
        path: folder, hub name, or ``builtin:task/teacher``.
        dtype: torch dtype of the weights; reductions are in float32 whatever it is.
    """

    path: str
    dtype: str

    def load(self, vocab: int | None = None, chunk: int = 2048) -> FrozenScorer:
        """Load the model, frozen and in evaluation mode, to be read up to ``vocab`` ids, ``chunk`` positions at once.

        Raises:
            ConfigError: nothing that can be loaded lies at ``path``, or its head is not supported.
        """
        model = load_model(self.path, "teacher.path", self.dtype).eval().requires_grad_(False)
        scorer = Scorer(model, vocab, chunk)
        check_head(scorer, self.path)
        return FrozenScorer(scorer)


@dataclass(frozen=True)
class FrozenScorer:
    """A scorer without gradient. Not an ``nn.Module``: it never becomes part of the trained module."""

    scorer: Scorer

    @torch.no_grad()
    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Score the tokens; see :class:`~opd_lightning.scorer.Scorer`."""
        return self.scorer(tokens, want, support_ids)

    def to(self, device: torch.device | str) -> FrozenScorer:
        """Move the weights to ``device``, in place."""
        self.scorer.to(device)
        return self
