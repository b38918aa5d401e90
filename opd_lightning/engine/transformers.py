"""Generation in this process, with the student's own weights and no copy of the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.engine import loops
from opd_lightning.engine.bounds import check_ahead
from opd_lightning.engine.decoder import Decoder, read
from opd_lightning.engine.drawn import Record, join
from opd_lightning.engine.mixed import Library, decode_mixed
from opd_lightning.engine.sampling import check, row_uniforms
from opd_lightning.engine.shape import agrees, supports
from opd_lightning.engine.static import StaticDecoder
from opd_lightning.engine.steps import Steps
from opd_lightning.errors import ConfigError, require
from opd_lightning.layers import evaluating
from opd_lightning.protocols import Combine
from opd_lightning.types import Generation, PromptBatch, Sampling

_METHODS = ("auto", "loop", "generate")


@dataclass(frozen=True, kw_only=True)
class TransformersEngine:
    """Draws responses from a transformers model.

    ``batch_size`` is the most rows decoded together. ``method``: ``"loop"`` is the fast decoder for
    Llama, Mistral, Qwen2 and Qwen3, which refuses other models; ``"generate"`` is the library's own
    ``model.generate``, for every model; ``"auto"`` is the first where it can be. Greedy, they give the
    same tokens; sampled too, but for a draw within rounding of the border between two tokens. ``ahead``:
    collections that are written before they are needed, by the weights of that time. ``graphs``: the fast
    decoder's steps are recorded as CUDA graphs, which see the same tokens up to rounding; on a CPU the same
    steps run unrecorded, in the same memory, for no gain. A model that it does not run is warned about.
    """

    batch_size: int = 128
    method: str = "auto"
    ahead: int = 0
    graphs: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for a field out of range."""
        require(self.batch_size >= 1, "engine.batch_size", "be at least 1", self.batch_size, "raise it")
        require(self.method in _METHODS, "engine.method", f"be one of {_METHODS}", self.method, "use auto")
        check_ahead(self.ahead)
        require(isinstance(self.graphs, bool), "engine.graphs", "be true or false", self.graphs, "use false")
        whole = self.graphs and self.method == "generate"
        remedy = "use engine.method=auto, whose fast decoder is what is recorded"
        require(not whole, "engine.graphs", "be false with engine.method=generate", self.graphs, remedy)

    @torch.no_grad()
    def generate(self, model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> Generation:
        """Draw one response for each row of ``prompts``, each from its own seed, with the weights as they are now.

        The responses come in the order of the prompts, on their device. Under FSDP the caller gathers the
        weights around this call. Raises ConfigError for settings out of range, and for
        ``method="loop"`` with a model that the decoder does not run.
        """
        _check(prompts, sampling)
        with evaluating(model):
            decoder = self._steps(model, prompts, sampling) if len(prompts) else None

            def decode(ids: Tensor, mask: Tensor, uniforms: Tensor) -> Generation:
                if decoder is None:
                    return loops.generate(model, ids, mask, uniforms, sampling)
                return loops.decode(decoder, ids, mask, uniforms, sampling)

            return self._in_chunks(prompts, sampling, decode)

    @torch.no_grad()
    def generate_mixed(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        prompts: PromptBatch,
        sampling: Sampling,
        combine: Combine,
    ) -> Generation:
        """Draw each token from ``combine(student's log-probs, teacher's log-probs)``, which both models then read.

        As :meth:`generate` in all else; see :func:`~opd_lightning.engine.mixed.decode_mixed`. Both models
        read the same prompts. With ``method="generate"`` it is the library's forward and cache that run.
        """
        _check(prompts, sampling)
        with evaluating(student), evaluating(teacher):
            models: list[Steps] = []
            if len(prompts):
                models = [
                    self._steps(model, prompts, sampling) or Library(model) for model in (student, teacher)
                ]

            def decode(ids: Tensor, mask: Tensor, uniforms: Tensor) -> Generation:
                return decode_mixed(models, ids, mask, uniforms, sampling, combine)

            return self._in_chunks(prompts, sampling, decode)

    def _in_chunks(
        self, prompts: PromptBatch, sampling: Sampling, decode: Callable[[Tensor, Tensor, Tensor], Generation]
    ) -> Generation:
        """Decode at most ``batch_size`` rows at a time; ``decode`` gets their ids, mask and uniform numbers."""
        if len(prompts) == 0:
            return Record(0, sampling, prompts.ids.device).generation()
        lengths = prompts.mask.sum(-1)
        uniforms = row_uniforms(prompts.seeds, sampling.max_new_tokens).to(prompts.ids.device)
        order = lengths.argsort(stable=True)
        chunks = []
        for rows in order.tensor_split(self._chunks(prompts)):
            # The rows of a chunk have similar lengths; the padding that all of them share goes.
            width = int(lengths[rows].amax())
            chunks.append(decode(prompts.ids[rows, -width:], prompts.mask[rows, -width:], uniforms[rows]))
        return join(chunks, order)

    def _chunks(self, prompts: PromptBatch) -> int:
        return -(-len(prompts) // self.batch_size)

    def _steps(self, model: PreTrainedModel, prompts: PromptBatch, sampling: Sampling) -> Steps | None:
        """Return the fast decoder, with steps that can be recorded where ``graphs`` asks for it, or None."""
        decoder = self._decoder(model, prompts)
        if not self.graphs:
            return decoder
        if decoder is None:
            warnings.warn(
                f"engine.graphs has no effect on this {type(model).__name__}, which the library's own loop "
                "runs; engine.graphs=false asks for it at once",
                stacklevel=2,
            )
            return None
        rows = -(-len(prompts) // self._chunks(prompts))
        return StaticDecoder(
            decoder, rows=rows, slots=int(prompts.mask.sum(-1).amax()) + sampling.max_new_tokens - 1
        )

    def _decoder(self, model: PreTrainedModel, prompts: PromptBatch) -> Decoder | None:
        """Return the model's weights for the fast decoder, read afresh, or None for the library's loop."""
        if self.method == "generate":
            return None
        if supports(model):
            decoder = read(model)
            if agrees(model, decoder, prompts.ids, prompts.mask):
                return decoder
        if self.method == "loop":
            raise ConfigError(
                f"`engine.method` must be auto or generate for this {type(model).__name__}, got 'loop'; "
                "the fast decoder runs unmodified Llama, Mistral, Qwen2 and Qwen3 only"
            )
        return None


def _check(prompts: PromptBatch, sampling: Sampling) -> None:
    check(sampling)
    whole = bool(prompts.mask.any(-1).all())
    require(whole, "prompts", "have at least one token each", 0, "check the chat template")
