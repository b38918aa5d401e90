"""What a decode writes down, token by token, and how the decodes of several chunks become one generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from opd_lightning.types import Finish, Generation, Sampling


class Record:
    """The tokens drawn so far for a fixed set of rows; rows may be written in any order, one step at a time."""

    def __init__(self, batch: int, sampling: Sampling, device: torch.device) -> None:
        """Make room for ``sampling.max_new_tokens`` tokens a row."""
        shape, self.stop_ids = (batch, sampling.max_new_tokens), sampling.stop_ids
        self.ids: Int[Tensor, "batch time"] = torch.zeros(shape, dtype=torch.long, device=device)
        self.mask: Bool[Tensor, "batch time"] = torch.zeros(shape, dtype=torch.bool, device=device)
        self.logp: Float[Tensor, "batch time"] = torch.zeros(shape, device=device)
        self.top: Int[Tensor, "batch time k"] | None = None
        if sampling.top_ids:
            self.top = self.ids.new_zeros(*shape, sampling.top_ids)
        self.finish = self.ids.new_full((batch,), Finish.LENGTH)
        self.stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)

    def write(
        self,
        rows: Int[Tensor, " alive"],
        time: int,
        ids: Int[Tensor, " alive"],
        logp: Float[Tensor, " alive"],
        top: Int[Tensor, "alive k"] | None,
    ) -> Bool[Tensor, " alive"]:
        """Note one drawn token for each of ``rows``; return which of them it ends."""
        self.ids[rows, time] = ids
        self.mask[rows, time] = True
        self.logp[rows, time] = logp
        if self.top is not None and top is not None:
            self.top[rows, time] = top
        done = torch.isin(ids, self.stops)
        self.finish[rows] = torch.where(done, int(Finish.EOS), int(Finish.LENGTH))
        return done

    def generation(self) -> Generation:
        """Return everything, cut to the longest row."""
        longest = int(self.mask.any(0).sum())
        return Generation(
            ids=self.ids[:, :longest],
            mask=self.mask[:, :longest],
            behavior_logp=self.logp[:, :longest],
            finish=self.finish,
            top_ids=None if self.top is None else self.top[:, :longest],
        )


def join(chunks: Sequence[Generation], order: Int[Tensor, " batch"]) -> Generation:
    """Stack chunks whose rows, one after another, are the rows ``order``; return them in order 0, 1, 2, …"""
    longest = max(chunk.ids.shape[1] for chunk in chunks)
    place = order.argsort()

    def together(parts: Sequence[Tensor]) -> Tensor:
        padded = [F.pad(p, [0, 0] * (p.ndim - 2) + [0, longest - p.shape[1]]) for p in parts]
        return torch.cat(padded)[place]

    tops = [chunk.top_ids for chunk in chunks if chunk.top_ids is not None]
    return Generation(
        ids=together([chunk.ids for chunk in chunks]),
        mask=together([chunk.mask for chunk in chunks]),
        behavior_logp=together([chunk.behavior_logp for chunk in chunks]),
        finish=torch.cat([chunk.finish for chunk in chunks])[place],
        top_ids=together(tops) if tops else None,
    )
