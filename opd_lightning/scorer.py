"""The one place where hidden states meet a language-model head.

A :class:`Scorer` wraps a causal language model and answers a :class:`~opd_lightning.types.Want` at every
response position: backbone and head run inside one ``forward``, so sharding hooks fire once, a tied head
is the embedding itself, and no tensor with a vocabulary axis leaves. Student, teacher and reference are
all scorers; only the student's is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_lightning.errors import ConfigError
from opd_lightning.functional import head as heads
from opd_lightning.layout import last_states
from opd_lightning.types import FullTerm, Scores, TokenBatch, Want


class Scorer(nn.Module):
    """Scores given tokens with a causal language model.

    Args:
        model: a transformers causal language model.
        vocab: width of the vocabulary shared with the other model of the run; head rows at or above
            it are padding and do not exist for any probability (numerics.md, section 7).
        scratch: bytes of logits that may be alive at once, whatever the number of positions.
        temperature: the scoring temperature tau, of every probability that is read here: softmax(z / tau).
        layout: how rows go through the backbone, one of :data:`~opd_lightning.layout.LAYOUTS`; no score
            depends on it but by rounding.

    :func:`check_head` tells whether the model's logits are what its head gives, as is assumed here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocab: int | None = None,
        scratch: int = heads.SCRATCH,
        temperature: float = 1.0,
        layout: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.vocab: int = vocab or int(model.get_output_embeddings().weight.shape[0])
        self.scratch = scratch
        self.temperature = temperature
        self.layout = layout
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale: float = _logit_scale(config)
        # Other models, for full-vocabulary divergences; a plain attribute and no registered module, so that
        # none of their weights reaches an optimizer or a checkpoint.
        self.__dict__["_targets"] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def head(self) -> heads.Head:
        """The head over the shared vocabulary, read afresh because sharding swaps its tensors."""
        layer = self.model.get_output_embeddings()
        head = heads.Head(
            weight=layer.weight,
            bias=getattr(layer, "bias", None),
            softcap=self.softcap,
            scale=self.logit_scale,
            temperature=self.temperature,
        )
        # The gradient of a slice, even of the whole, is a copy as large as the weight.
        return head if head.vocab == self.vocab else head.cut(slice(self.vocab))

    def set_target(self, name: str, scorer: Scorer) -> None:
        """Name a frozen model whose head a :class:`FullTerm` reads, wherever it is by then."""
        self.__dict__["_targets"][name] = scorer

    def compare(
        self,
        hidden: Float[Tensor, "n hidden"],
        target_hidden: Float[Tensor, "n width"],
        term: FullTerm,
        share: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, " n"]:
        """Return a full-vocabulary divergence from this model's and a named target's hidden states.

        ``share`` is a hint at each value's factor in the loss; see :func:`~opd_lightning.functional.head.full`.
        """
        target = self.__dict__["_targets"][term.target]
        return heads.full(
            hidden,
            self.head,
            target_hidden,
            target.head,
            term.divergence,
            share=share,
            scratch=self.scratch,
        )

    def forward(
        self,
        tokens: TokenBatch,
        want: Want,
        support_ids: Int[Tensor, "batch time k"] | None = None,
        hidden_of: Mapping[str, Tensor] | None = None,
        share: Float[Tensor, "batch time"] | None = None,
    ) -> Scores:
        """Score every response token; see :class:`~opd_lightning.types.Want` and ``Scores``.

        Only positions that predict a response token reach the head, in fp32 accumulation. The temperature
        is this scorer's and no truncation applies, whatever the sampler did. ``hidden_of`` holds the hidden
        states ``[batch time width]`` of the targets that full terms compare with, ``share`` a hint at each
        token's factor in the loss, which spares a full term's backward pass its products.
        """
        mask = tokens.mask
        hidden = self._hidden(tokens)
        scores: dict[str, Any] = {}
        if want.support == "renormalised" and not (want.taken or want.entropy or want.top):
            assert support_ids is not None
            logits = heads.support_logits(hidden, self.head, support_ids[mask])
            scores["support_logp"] = _fill(torch.log_softmax(logits, -1), mask)
        elif want.taken or want.entropy or want.top or want.support != "none":
            scores |= self._exact(hidden, tokens, want, support_ids)
        if want.full:
            assert hidden_of is not None
            hint = None if share is None else share[mask]
            scores["full"] = {
                term: _fill(self.compare(hidden, hidden_of[term.target][mask], term, hint), mask)
                for term in want.full
            }
        if want.hidden:
            scores["hidden"] = _fill(hidden, mask)
        return Scores(**scores)

    def _exact(
        self, hidden: Float[Tensor, "n hidden"], tokens: TokenBatch, want: Want, support_ids: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Everything that needs the true normaliser, in one pass over the head."""
        mask = tokens.mask
        ids = tokens.ids[mask].unsqueeze(-1)
        if want.support != "none":
            assert support_ids is not None
            ids = torch.cat([ids, support_ids[mask]], -1)
        top_ids = top_logp = None
        if want.top:
            top_ids, top_logp, logp, entropy = heads.top(
                hidden, self.head, want.top, ids, entropy=want.entropy, scratch=self.scratch
            )
        else:
            logp, entropy = heads.exact(hidden, self.head, ids, entropy=want.entropy, scratch=self.scratch)
        return {
            "taken_logp": _fill(logp[:, 0], mask) if want.taken else None,
            "support_logp": _fill(logp[:, 1:], mask) if want.support != "none" else None,
            "entropy": _fill(entropy, mask) if entropy is not None else None,
            "top_ids": _fill(top_ids, mask) if top_ids is not None else None,
            "top_logp": _fill(top_logp, mask) if top_logp is not None else None,
        }

    def _hidden(self, tokens: TokenBatch) -> Float[Tensor, "n hidden"]:
        """Last hidden states that predict each response token, response order, padding removed."""
        return last_states(self.model, tokens, self.layout)


def _fill(values: Tensor, mask: Bool[Tensor, "batch time"]) -> Tensor:
    """Put ``values [n ...]`` at the True places of ``mask``, zeros elsewhere."""
    out = values.new_zeros((*mask.shape, *values.shape[1:]))
    # index_put rather than masked assignment: differentiable without an in-place write on a leaf.
    return out.index_put(torch.where(mask), values)


def _logit_scale(config: object) -> float:
    """Return the factor that a model family puts on its logits."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        return float(scale)
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        return 1.0 / float(scaling)
    return 1.0


@torch.no_grad()
def check_head(scorer: Scorer, path: str) -> None:
    """Refuse a model whose own logits are not what the scorer reads, before anything trains on them.

    The scorer's whole way is compared, positions included: a response behind a padded prompt, and the logits
    at t - 1 for the token at t.

    Raises:
        ConfigError: its architecture does something at the head that :class:`Scorer` does not know.
    """
    row = torch.arange(1, 9, device=scorer.device) % scorer.vocab
    prompt = torch.cat([row.new_zeros(2), row[:3]]).unsqueeze(0)
    exists = torch.arange(len(prompt[0]), device=row.device).unsqueeze(0) >= 2
    response = row[3:].unsqueeze(0)
    tokens = TokenBatch(
        prompt_ids=prompt, prompt_mask=exists, ids=response, mask=torch.ones_like(response, dtype=torch.bool)
    )
    logits = scorer.model(input_ids=row.unsqueeze(0), use_cache=False).logits[:, 2:-1, : scorer.vocab].float()
    exact, ids = torch.log_softmax(logits / scorer.temperature, -1).topk(min(16, scorer.vocab), -1)
    ours = scorer(tokens, Want(support="exact"), ids).support_logp
    assert ours is not None
    gap = (ours - exact).abs().max().item()
    # Activations that are quantised too are rounded by their neighbours in a batch.
    whole = next(scorer.parameters()).dtype == torch.float32 and not getattr(
        scorer.model, "is_quantized", False
    )
    tolerance = 1e-3 if whole else 0.3
    if gap > tolerance:
        raise ConfigError(
            f"the head of {path!r} ({type(scorer.model).__name__}) gives log-probs that differ by {gap:.3g} from "
            "the model's own: its architecture does something there that is not supported; use another model "
            "or teach `opd_lightning.scorer.Scorer` its head"
        )
