"""The special-token mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.errors import ConfigError, require
from opd_lightning.types import Experience, Needs
from opd_lightning.world import World


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Takes the first occurrence of each listed id in each response out of the loss.

    Where student and teacher write different frames around the same answer, a few tokens carry nearly
    the whole log-ratio: for ``<|im_end|>`` -0.00 against -58.71 (Revisiting OPD, arXiv 2603.25562).
    Only response tokens are looked at, and later occurrences stay.

    ``tokens`` are strings; :meth:`bind` turns them into ``ids`` with the student's tokenizer.

    Raises:
        ConfigError: if ``tokens`` is no list of strings; on a call before :meth:`bind`.
    """

    tokens: Sequence[str]
    ids: tuple[int, ...] | None = None

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        strings = not isinstance(self.tokens, str) and all(isinstance(t, str) for t in self.tokens)
        require(strings, "mask.special_tokens.tokens", "be a list of strings", self.tokens, 'use ["<"]')
        object.__setattr__(self, "tokens", tuple(self.tokens))

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Return this mask with all ids of each string's encoding, the unknown id left out."""
        encoded = [tokenizer.encode(t, add_special_tokens=False) for t in self.tokens]
        ids = {i for string in encoded for i in string} - {tokenizer.unk_token_id}
        return replace(self, ids=tuple(sorted(ids)))

    def __call__(
        self, experience: Experience, inside: Bool[Tensor, "batch time"], world: World
    ) -> Bool[Tensor, "batch time"]:
        """Return True at the response tokens that stay."""
        if self.ids is None:
            raise ConfigError("`mask.special_tokens` holds strings only; call bind(tokenizer) first")
        rollout = experience.rollout
        keep = rollout.mask.clone()
        for token in self.ids:
            hit = (rollout.ids == token) & rollout.mask
            keep &= ~(hit & (hit.cumsum(-1) == 1))
        return keep
