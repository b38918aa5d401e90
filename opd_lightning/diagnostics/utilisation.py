"""Model FLOPs: how much arithmetic a run's models needed, and what share of the device's peak that is.

Counted is what the models have to do and not what is done: neither padding, nor logits that are computed a
second time to save memory, nor attention's products, which depend on the length (a few percent below some
thousand tokens). Per token of prompt or response that has to be read, N weights without embedding and head:

    generated or scored    2 N
    trained                2 N + 2 N + 2 N_trained      (6 N where all is trained)

and at each response position, for the rows of the head of width H that are asked for (its whole vocabulary
V, or the K of a support that is renormalised): 2 H V, or 2 H K; three times that in training.

    model TFLOP/s = operations / seconds / 1e12        utilisation = model TFLOP/s / peak TFLOP/s
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from opd_lightning.scorer import Scorer
from opd_lightning.types import PromptBatch, TokenBatch, Want

_SIZES = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations of one model.

    Args:
        body: weights that a token is multiplied with, embedding and head left out; of a mixture of experts
            those of the chosen experts.
        trained: share of them that is trained.
        head: width of the hidden states; times ``vocab`` the head's weights.
        vocab: ids that are scored.
        head_trained: whether the head's weights are.
    """

    body: float
    trained: float
    head: int
    vocab: int
    head_trained: bool

    @classmethod
    def of(cls, scorer: Scorer) -> Work:
        """Count a scorer's weights."""
        return cls.of_model(scorer.model, scorer.vocab)

    @classmethod
    def of_model(cls, model: PreTrainedModel, vocab: int) -> Work:
        """Count a model's weights, which may be without memory; ``vocab`` ids are scored."""
        ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        rest = [(name, p) for name, p in model.named_parameters() if id(p) not in ends]
        used = {name: p.numel() * _share_used(name, model) for name, p in rest}
        body = sum(used.values())
        trained = sum(used[name] for name, p in rest if p.requires_grad)
        head = model.get_output_embeddings().weight
        return cls(
            body=body,
            trained=trained / body if body else 0.0,
            head=head.shape[1],
            vocab=vocab,
            head_trained=head.requires_grad,
        )

    def forward(self, read: float, predicted: float, rows: float) -> float:
        """Return the operations of a forward of ``read`` tokens that asks ``rows`` ids at ``predicted`` positions."""
        return 2.0 * self.body * read + 2.0 * self.head * rows * predicted

    def backward(self, read: float, predicted: float, rows: float) -> float:
        """Return those of its backward: gradients of the inputs, and of the weights that are trained."""
        body, head = 2.0 * self.body * read, 2.0 * self.head * rows * predicted
        return body * (1.0 + self.trained) + head * (2.0 if self.head_trained else 1.0)


class Meter:
    """Tells ``charge`` the operations of every pass of the scorers that it is attached to."""

    def __init__(self, charge: Callable[[float], None]) -> None:
        self.charge = charge
        self.works: dict[int, Work] = {}

    def attach(self, scorer: Scorer) -> None:
        """Follow a scorer; one that is two models' is followed once."""
        if id(scorer) not in self.works:
            self.works[id(scorer)] = Work.of(scorer)
            scorer.register_forward_hook(self._passed, with_kwargs=True)

    def generated(self, scorer: Scorer | None, prompts: PromptBatch, lengths: Int[Tensor, " batch"]) -> None:
        """Charge the responses that a model wrote; nothing reads the last token of each."""
        if (work := self.works.get(id(scorer))) is not None:
            tokens = int(lengths.sum())
            read = int(prompts.mask.sum()) + tokens - int((lengths > 0).sum())
            self.charge(work.forward(read, tokens, work.vocab))

    def _passed(self, scorer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], _: object) -> None:
        asked = dict(zip(("tokens", "want", "support_ids", "hidden_of"), given, strict=False)) | named
        self.charge(
            scored(
                self.works[id(scorer)],
                asked["tokens"],
                asked["want"],
                asked.get("support_ids"),
                asked.get("hidden_of") or {},
                learning=torch.is_grad_enabled(),
            )
        )


def scored(
    work: Work,
    tokens: TokenBatch,
    want: Want,
    support_ids: Tensor | None,
    hidden_of: Mapping[str, Tensor],
    *,
    learning: bool,
) -> float:
    """Return the operations of a scorer's pass, with its backward where it is ``learning``."""
    predicted = int(tokens.mask.sum())
    read = int(tokens.prompt_mask.sum()) + predicted - int(tokens.mask.any(-1).sum())
    exact = want.taken or want.entropy or bool(want.top) or want.support == "exact"
    rows = float(work.vocab if exact else 0)
    if want.support == "renormalised" and not exact and support_ids is not None:
        rows = float(support_ids.shape[-1])
    rows += work.vocab * len(want.full)
    widths = [hidden_of[term.target].shape[-1] for term in want.full]
    other = 2.0 * predicted * work.vocab * sum(widths)
    total = work.forward(read, predicted, rows) + other
    return total + work.backward(read, predicted, rows) if learning else total


def _share_used(name: str, model: PreTrainedModel) -> float:
    """Return the share of a weight that a token meets: of experts, those that it is sent to."""
    if ".experts." not in name:
        return 1.0
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((getattr(config, n) for n in names if getattr(config, n, None)), 1)
    return float(getattr(config, "num_experts_per_tok", count) / count)


@torch.no_grad()
def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Return the TFLOP/s of the fastest square matrix product that was found in about ``seconds``.

    Sizes grow as long as there is time. This is what these threads or this device reach now, in this
    number format, and not a data sheet's number, of which it is a part.
    """
    best, begun = 0.0, time.perf_counter()
    for size in _SIZES:
        left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        spent = min(_product(left, right) for _ in range(3))
        best = max(best, 2.0 * size**3 / spent / 1e12)
        # The next size takes eight times as long, three times over.
        if time.perf_counter() - begun + 24 * spent > seconds:
            break
    return best


def _product(left: Tensor, right: Tensor) -> float:
    on_device = left.device.type == "cuda"
    if on_device:
        torch.cuda.synchronize(left.device)
    begun = time.perf_counter()
    left @ right
    if on_device:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - begun
