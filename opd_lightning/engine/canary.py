"""A few tokens that tell whether an engine's copy of the weights is the trainer's: drawn by one, scored by both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd_lightning.engine.vllm_adapter import Drawn
from opd_lightning.errors import ConfigError
from opd_lightning.lora import adapted
from opd_lightning.types import PromptBatch, Sampling

Draw = Callable[[Sequence[Sequence[int]], Sequence[int], Sampling], list[Drawn]]

_ROWS, _TOKENS = 4, 8


@dataclass
class Canary:
    """Prompts that stay the same through a run, so that keys and values kept from older weights show.

    ``rows`` holds prompts of one length; it is filled from the first prompts that are generated for.
    """

    rows: list[list[int]] = field(default_factory=list)

    def settle(self, prompts: PromptBatch, block: int, longest: int) -> None:
        """Take the first prompts, each repeated until it fills a block of the engine's cache, once."""
        if self.rows:
            return
        length = min(block + _TOKENS, longest - _TOKENS)
        for ids, mask in list(zip(prompts.ids, prompts.mask, strict=True))[:_ROWS]:
            prompt = ids[mask].tolist()
            self.rows.append((prompt * -(-length // len(prompt)))[:length])

    def gap(self, draw: Draw, model: PreTrainedModel, temperature: float = 1.0) -> float:
        """Return the largest difference of a drawn token's log-prob between the engine and ``model``, in nats.

        The tokens are drawn from the whole vocabulary. At temperature 1 an engine that reports raw log-probs
        reports them alike; at another one it differs from one that reports those of its sampler.
        """
        sampling = Sampling(max_new_tokens=_TOKENS, temperature=temperature)
        drawn = draw(self.rows, range(1, len(self.rows) + 1), sampling)
        responses = torch.tensor([one.ids for one in drawn])
        ids = torch.cat([torch.tensor(self.rows), responses], 1).to(model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=_TOKENS + 1).logits[:, :-1]
        logp = (logits.float() / temperature).log_softmax(-1).gather(-1, ids[:, -_TOKENS:, None])[..., 0]
        theirs = torch.tensor([one.logp for one in drawn], device=logp.device)
        return float((theirs - logp).detach().abs().max())


def due(model: PreTrainedModel, pushes: int, every: int) -> bool:
    """Return whether the log-probs are compared after this sending.

    After the first and each ``every``-th, 0 for the first alone. With adapters after each: what is sent is then
    not what the trainer computes with, but a sum that is made for the engine.
    """
    return pushes == 1 or (every > 0 and (bool(adapted(model)) or pushes % every == 0))


def tolerance_of(asked: float | None, dtype: str) -> float:
    """Return the difference in nats that is let pass: what was asked for, else 1e-3 in float32 and 0.3 elsewhere."""
    return asked if asked is not None else (1e-3 if dtype == "float32" else 0.3)


def strayed(gap: float, allowed: float, pushes: int, cause: str) -> ConfigError:
    """Return the error of an engine whose log-probs are not the trainer's."""
    return ConfigError(
        f"`engine` must give the student's own log-probs within engine.tolerance={allowed}, got a difference "
        f"of {gap:.3g} after {pushes} weight updates ({cause}); use engine=transformers, or raise engine.tolerance "
        "if this is the rounding of engine.dtype"
    )


def unlike(
    trainer: Iterable[tuple[str, Tensor]], engine: Mapping[str, float], packed: Mapping[str, Sequence[str]]
) -> tuple[list[str], int]:
    """Return the names of weights whose sums differ, and how many were compared.

    ``engine`` holds sums by the engine's names, where a ``packed`` weight stands for several of the trainer's.
    """
    whole_of = {part: whole for whole, parts in packed.items() for part in parts}
    sums: dict[str, tuple[float, float]] = {}
    for name, weight in trainer:
        steps = [whole_of.get(step, step) for step in name.split(".")]
        total, size = sums.get(".".join(steps), (0.0, 0.0))
        wide = weight.detach().double()
        sums[".".join(steps)] = total + float(wide.sum()), size + float(wide.abs().sum())
    compared = sums.keys() & engine.keys()
    # Rounded to a half type, a sum is off by a part in a thousand of its terms at most.
    differ = [name for name in sorted(compared) if abs(sums[name][0] - engine[name]) > 1e-5 * sums[name][1]]
    return differ, len(compared)
