"""A CPU's stand-in for a CUDA graph: the operations of one run, played again on the same tensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "unique_dim"}
"""Operations whose result, or the size of it, the host has to wait for."""
FROM_HOST = {"lift_fresh", "scalar_tensor", "tensor"}


class Refused(RuntimeError):
    """An operation that no graph can hold."""


class Watch(TorchDispatchMode):
    """Refuses what a CUDA graph refuses: numbers for the host, sizes that depend on data, the host's tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS or name in FROM_HOST:
            raise Refused(f"{func} waits for the device or copies from the host")
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in ("index", "index_put", "index_put_") and any(t.dtype == torch.bool for t in inputs[1:]):
            raise Refused(f"{func} picks by a mask, whose sum the host has to know")
        self.check_devices(func, inputs)
        out = self.done(func, args, kwargs or {})
        self.check_devices(func, inputs + [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)])
        return out

    def check_devices(self, func, tensors):
        if len({t.device for t in tensors}) > 1:
            raise Refused(f"{func} copies between devices")

    def done(self, func, args, kwargs):
        return func(*args, **kwargs)


class _Writing(Watch):
    def __init__(self, tape: list) -> None:
        super().__init__()
        self.tape = tape

    def done(self, func, args, kwargs):
        out = func(*args, **kwargs)
        self.tape.append((func, args, kwargs, out))
        return out


class Tape:
    """As a CUDA graph: writing it down computes nothing that counts, then every run is the same operations.

    What Python decided at the time, a slice's end for example, stays as it was; results go where they went.
    """

    def __init__(self, function: Callable[[], None], kept: list[Tensor]) -> None:
        held = [t.clone() for t in kept]
        self.calls: list = []
        with _Writing(self.calls):
            function()
        for tensor, value in zip(kept, held, strict=True):
            tensor.copy_(value)

    def __call__(self) -> None:
        for func, args, kwargs, out in self.calls:
            found = func(*args, **kwargs)
            for was, now in zip(pytree.tree_leaves(out), pytree.tree_leaves(found), strict=True):
                if isinstance(was, Tensor) and was.data_ptr() != now.data_ptr():
                    was.copy_(now)


class Tapes:
    """Records at the first run; counts what it records and plays."""

    def __init__(self) -> None:
        self.recorded, self.played = 0, 0

    def __call__(self, function):
        tapes: list[Tape] = []

        def run() -> None:
            if not tapes:
                b = function.args[1]
                kept = [b.ids, b.position, b.slots.store, b.slots.slot, b.bias, b.logits]
                tapes.append(Tape(function, kept))
                self.recorded += 1
            self.played += 1
            tapes[0]()

        return run
