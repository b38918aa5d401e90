"""Attention heads widened with zeros, for kernels that exist for some head sizes only.

A Qwen3 attention of head size d computes, with any larger size D, what it did before, if (s = sqrt(D / d))

- each half of a query, key and value head is followed by (D - d) / 2 zeros, so that the rotation still turns
  the i-th number of one half with the i-th of the other;
- the rotation's base is raised to the power D / d, so that its i-th frequency ``base ** (-2 i / d)`` stays;
- queries and keys are s times larger, since the norm takes their mean square over D numbers;
- the keys' norm weight is s times smaller. The queries' norm weight would be s times smaller too, and s times
  larger for the attention's ``1 / sqrt(D)``: it stays.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from opd_lightning.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WiderHeads:
    """From a model's configuration and weights to those of the same model with heads of size ``wide``."""

    narrow: int
    wide: int

    def config(self, config: Any) -> Any:
        """Return the wider model's configuration."""
        wider = copy.deepcopy(config)
        wider.head_dim = self.wide
        ropes = dict(config.rope_parameters)
        ropes["rope_theta"] = float(ropes["rope_theta"]) ** (self.wide / self.narrow)
        wider.rope_parameters = ropes
        return wider

    def weights(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the wider model's weights, in the order of ``named``."""
        scale = math.sqrt(self.wide / self.narrow)
        for name, weight in named:
            kind = name.rsplit(".", 2)[-2:]
            if kind[0] in ("q_proj", "k_proj"):
                weight = self._spread(weight) * scale
            elif kind[0] == "v_proj" or kind == ["q_norm", "weight"]:
                weight = self._spread(weight)
            elif kind == ["k_norm", "weight"]:
                weight = self._spread(weight) / scale
            elif kind == ["o_proj", "weight"]:
                weight = self._spread(weight.T).T.contiguous()
            yield name, weight

    def _spread(self, rows: Float[Tensor, "narrow ..."]) -> Float[Tensor, "wide ..."]:
        """Put zeros behind each half of each head along the first axis."""
        halves = rows.unflatten(0, (-1, 2, self.narrow // 2))
        out = halves.new_zeros(*halves.shape[:2], self.wide // 2, *halves.shape[3:])
        out[:, :, : self.narrow // 2] = halves
        return out.flatten(0, 2)


def wider_heads(config: Any, sizes: tuple[int, ...] | None) -> WiderHeads | None:
    """Return what fits the model's heads to one of ``sizes``, None where they fit (or ``sizes`` is None).

    Raises:
        ConfigError: they do not fit, and the model is none that can be widened.
    """
    plain = config.get_text_config()
    narrow = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
    if sizes is None or narrow in sizes:
        return None
    ropes = getattr(plain, "rope_parameters", None) or {}
    default = ropes.get("rope_type") == "default" and ropes.get("partial_rotary_factor", 1) == 1
    wide = min((size for size in sizes if size > narrow and size % 2 == 0), default=None)
    if plain.model_type == "qwen3" and default and narrow % 2 == 0 and wide is not None:
        return WiderHeads(narrow=narrow, wide=wide)
    raise ConfigError(
        f"`engine` must have attention for heads of size {narrow}, got vLLM, which on this device has it for "
        f"{', '.join(map(str, sizes))} alone; use engine=transformers"
    )
