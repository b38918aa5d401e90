"""A frozen model that is on the device while it is used, and elsewhere otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from opd_lightning.loading import FrozenScorer
from opd_lightning.types import Scores, TokenBatch, Want


class Offload:
    """The weights of a frozen module, at rest or at work. Mutable; one a module.

    Frozen weights do not change, so that they are copied to the device and never back: the copies are dropped.
    Weights at rest lie in pinned memory where the work is on CUDA. Nothing is copied where rest and work are on one
    device.

    Args:
        module: frozen; its parameters and buffers are replaced in place, a tied one by one copy.
        rest: device between uses.
        carry: from a tensor at rest and the device of work to the copy to work with; None to move it.
    """

    def __init__(
        self,
        module: nn.Module,
        rest: torch.device | str,
        carry: Callable[[Tensor, torch.device], Tensor] | None = None,
    ) -> None:
        self.rest = torch.device(rest)
        self.work = self.rest
        self.carry = carry
        self.resting: list[Tensor] = []
        self.slots: list[tuple[dict[str, Tensor | None], str, int]] = []
        places: dict[int, int] = {}
        for each in module.modules():
            for table in (each._parameters, each._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        place = places.setdefault(id(tensor), len(self.resting))
                        self.resting += [tensor] if place == len(self.resting) else []
                        self.slots.append((table, name, place))  # type: ignore[arg-type]
        self.resting = [_like(tensor, tensor.to(self.rest)) for tensor in self.resting]
        self.kept: set[int] = set()
        self.users = 0
        self.up = False
        self._put(self.resting)

    def keep(self, module: nn.Module) -> None:
        """Have a part of the module stay on the device of work."""
        tables = {id(table) for table in (module._parameters, module._buffers)}
        self.kept |= {place for table, _, place in self.slots if id(table) in tables}

    def work_on(self, device: torch.device | str) -> None:
        """Set the device of work."""
        self.work = torch.device(device)
        if self.work.type == "cuda" and self.rest.type == "cpu":
            self.resting = [t if t.is_pinned() else _like(t, t.pin_memory()) for t in self.resting]
        self._put([self._carried(t) if n in self.kept else t for n, t in enumerate(self.resting)])
        self.up = False

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Leave the weights where work has them until the block ends, if it comes to that."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users and self.up:
                self.up = False
                self._put([None if n in self.kept else t for n, t in enumerate(self.resting)])

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Have the weights on the device of work inside the block."""
        with self.holding():
            if not self.up:
                self.up = True
                self._put([None if n in self.kept else self._carried(t) for n, t in enumerate(self.resting)])
            yield

    def _carried(self, tensor: Tensor) -> Tensor:
        if self.carry is not None:
            return _like(tensor, self.carry(tensor, self.work))
        # The stream of the copies is that of the products after them.
        return (
            tensor if tensor.device == self.work else _like(tensor, tensor.to(self.work, non_blocking=True))
        )

    def _put(self, tensors: list[Tensor] | list[Tensor | None]) -> None:
        """Set each place's tensor, None for the one that is there."""
        for table, name, place in self.slots:
            if (tensor := tensors[place]) is not None:
                table[name] = tensor


def _like(old: Tensor, new: Tensor) -> Tensor:
    """Return ``new`` as a parameter where ``old`` is one."""
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


@dataclass(frozen=True, kw_only=True)
class OffloadedScorer(FrozenScorer):
    """A frozen scorer whose weights are on the device while it scores or writes.

    Args:
        weights: those of its model.
    """

    weights: Offload

    @torch.no_grad()
    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Score the tokens; inside :meth:`holding` the weights come once for all calls."""
        with self.weights.awake():
            return self.scorer(tokens, want, support_ids)

    def to(self, device: torch.device | str) -> OffloadedScorer:
        """Do the work on ``device``."""
        self.weights.work_on(device)
        return self

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Leave the weights on the device until the block ends, from their first use in it on."""
        with self.weights.holding():
            yield

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Have the weights on the device inside the block, for whoever uses the model itself."""
        with self.weights.awake():
            yield

    def keep_head(self) -> None:
        """Have the head stay on the device: a comparison of whole vocabularies reads it while gradients flow."""
        self.weights.keep(self.scorer.model.get_output_embeddings())
