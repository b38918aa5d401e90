"""Log-probs at given ids and entropies under the full softmax, tile by tile.

Every tile of the ``[n vocab]`` logits gives its part of the normaliser and of the entropy, and the logits of
those ids that fall into it; the backward pass computes each tile once more. Four matrix products in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_lightning.functional.head import tiles
from opd_lightning.functional.head.asked import AskedGradient, placed
from opd_lightning.functional.head.gradients import Gradients
from opd_lightning.functional.head.kernels import Kernels, kernels
from opd_lightning.functional.head.spec import Head, product_dtype, wide


class Exact(NamedTuple):
    """Log-probs at the asked ids and, where asked, the entropy of the full distribution, nats."""

    logp: Float[Tensor, "n k"]
    entropy: Float[Tensor, " n"] | None


def exact(
    hidden: Float[Tensor, "n hidden"],
    head: Head,
    ids: Int[Tensor, "n k"],
    *,
    entropy: bool,
    scratch: int = tiles.SCRATCH,
) -> Exact:
    """Return log-probs of ``ids`` under the full softmax; ``scratch`` bytes of logits are alive at once.

    log p(v) = z_v - logsumexp(z),    H = logsumexp(z) - sum_v p(v) z_v

    Raises:
        IndexError: if the head does not have one of the ids.
        ValueError: if ``scratch`` is not positive.
    """
    head.check(ids)
    settings = _Settings(
        head=head.detach(),
        entropy=entropy,
        scratch=scratch,
        dtype=product_dtype(head.weight),
        kernels=kernels(head.weight),
    )
    logp, information = _Exact.apply(hidden, head.weight, head.bias, ids, settings)
    return Exact(logp, information if entropy else None)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the two passes share; ``dtype`` is that of the matrix products."""

    head: Head
    entropy: bool
    scratch: int
    dtype: torch.dtype
    kernels: Kernels

    def tiling(self, n: int) -> tuple[tiles.Tiling, tiles.Buffers]:
        """Return the tiles and their memory."""
        weight, count = self.head.weight, 1 + self.kernels.spares(self.entropy)
        kept: Any = {"dtype": self.kernels.dtype(self.dtype), "device": weight.device}
        grid = tiles.tiling(n, len(weight), scratch=self.scratch, buffers=count, **kept)
        return grid, tiles.Buffers(grid, count, **kept)


class _Exact(torch.autograd.Function):
    """Log-probs of the asked ids and the entropy of softmax(z), z the head's logits at every position."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        (grid, buffers), narrow = settings.tiling(len(hidden)), hidden.to(settings.dtype)
        like: Any = {"dtype": wide(weight.dtype), "device": hidden.device}
        lse = torch.empty(len(hidden), grid.width, **like)
        entropy = torch.empty_like(lse) if settings.entropy else None
        asked = torch.zeros(ids.shape, **like)
        with torch.autocast(hidden.device.type, enabled=False):
            for i, v in enumerate(grid.slices()):
                part, finish = weight[v].to(settings.dtype), settings.head.cut(v).finish
                for t in grid.blocks():
                    raw, *spare = buffers.tensors(len(narrow[t]), len(part))
                    tiles.multiply(narrow[t], part, raw)
                    inside, place = placed(ids[t], v)
                    asked[t] = torch.where(inside, raw.gather(-1, place).to(asked.dtype), asked[t])
                    lse[t, i], found = settings.kernels.statistics(
                        raw, finish, spare[0] if spare else None, settings.entropy
                    )
                    if entropy is not None and found is not None:
                        entropy[t, i] = found
        whole, information = tiles.joined(lse, entropy)
        finish = settings.head.finish
        logits = finish.capped(asked if finish.bias is None else asked + finish.bias[ids])
        ctx.save_for_backward(hidden, weight, bias, ids, logits, whole, information)
        ctx.settings = settings
        return logits - whole.unsqueeze(-1), whole.new_zeros(()) if information is None else information

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor, entropy_pull: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, logits, lse, entropy = ctx.saved_tensors
        settings: _Settings = ctx.settings
        (grid, buffers), narrow = settings.tiling(len(hidden)), hidden.to(settings.dtype)
        into = Gradients(ctx.needs_input_grad, hidden, weight, bias)
        lse_pull = -pull.sum(-1)
        asked = AskedGradient.of(
            ids, pull, logits, settings.head.finish, lse, entropy, None if entropy is None else entropy_pull
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for v in grid.slices():
                part, finish = weight[v].to(settings.dtype), settings.head.cut(v).finish
                for t in grid.blocks():
                    raw, *spare = buffers.tensors(len(narrow[t]), len(part))
                    tiles.multiply(narrow[t], part, raw)
                    more, its_pull = (None, None) if entropy is None else (entropy[t], entropy_pull[t])
                    other = spare[0] if spare else None
                    grad = settings.kernels.gradient(raw, finish, lse[t], lse_pull[t], more, its_pull, other)
                    asked.write(grad, t, v)
                    into.add(t, v, grad, narrow[t], part)
                into.close(v)
        return (*into.results(), None, None)
