"""Which implementation works on the tiles: torch, the reference, or Triton on a GPU."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_lightning.functional.head import gathered_torch, tiles, triton_gather, triton_rows
from opd_lightning.functional.head.spec import Finish, wide


@runtime_checkable
class Kernels(Protocol):
    """Work on a tile of raw products, which may be overwritten, and on the rows of a head at given ids."""

    def dtype(self, product: torch.dtype) -> torch.dtype:
        """Return what the raw products are kept in."""
        ...

    def spares(self, entropy: bool) -> int:
        """Return the number of tiles that :meth:`statistics` and :meth:`gradient` want beside the raw one."""
        ...

    def statistics(
        self, raw: Float[Tensor, "n v"], finish: Finish, spare: Float[Tensor, "n v"] | None, entropy: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
        """Return logsumexp(z) and, where asked, the entropy of softmax(z), nats."""
        ...

    def gradient(
        self,
        raw: Float[Tensor, "n v"],
        finish: Finish,
        lse: Float[Tensor, " n"],
        pull: Float[Tensor, " n"],
        entropy: Float[Tensor, " n"] | None,
        entropy_pull: Float[Tensor, " n"] | None,
        spare: Float[Tensor, "n v"] | None,
    ) -> Float[Tensor, "n v"]:
        """Return the gradient of ``pull * lse + entropy_pull * H`` in ``raw``."""
        ...

    def products(
        self,
        hidden: Float[Tensor, "n hidden"],
        weight: Float[Tensor, "vocab hidden"],
        ids: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n k"]:
        """Return ``hidden[t] . weight[ids[t, j]]``, in at least float32."""
        ...

    def pull_hidden(
        self, grad: Float[Tensor, "n k"], hidden: Tensor, weight: Tensor, ids: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n hidden"]:
        """Return the gradient of :meth:`products` in the hidden states."""
        ...

    def pull_weight(
        self, grad: Float[Tensor, "n k"], hidden: Tensor, weight: Tensor, ids: Int[Tensor, "n k"]
    ) -> Float[Tensor, "vocab hidden"]:
        """Return the gradient of :meth:`products` in the weight."""
        ...


class Torch:
    """The reference, in place and in at least float32."""

    def dtype(self, product: torch.dtype) -> torch.dtype:
        """Return at least float32."""
        return wide(product)

    def spares(self, entropy: bool) -> int:
        """Return 1 for entropies, where exp(z) needs a place beside z."""
        return int(entropy)

    def statistics(
        self, raw: Float[Tensor, "n v"], finish: Finish, spare: Float[Tensor, "n v"] | None, entropy: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
        """See :func:`~opd_lightning.functional.head.tiles.statistics`."""
        return tiles.statistics(raw, finish, spare if entropy else None)

    gradient = staticmethod(tiles.gradient)
    products = staticmethod(gathered_torch.products)

    def pull_hidden(
        self, grad: Float[Tensor, "n k"], hidden: Tensor, weight: Tensor, ids: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n hidden"]:
        """See :func:`~opd_lightning.functional.head.gathered_torch.pull_hidden`."""
        return gathered_torch.pull_hidden(grad, weight, ids).to(hidden.dtype)

    def pull_weight(
        self, grad: Float[Tensor, "n k"], hidden: Tensor, weight: Tensor, ids: Int[Tensor, "n k"]
    ) -> Float[Tensor, "vocab hidden"]:
        """See :func:`~opd_lightning.functional.head.gathered_torch.pull_weight`."""
        return gathered_torch.pull_weight(grad, hidden, ids, len(weight)).to(weight.dtype)


class Triton:
    """Kernels for a GPU: the products stay in their own dtype, and are read once a pass."""

    def dtype(self, product: torch.dtype) -> torch.dtype:
        """Return the products' own."""
        return product

    def spares(self, entropy: bool) -> int:
        """Return 0: sums and gradients are made on the way."""
        return 0

    def statistics(
        self, raw: Float[Tensor, "n v"], finish: Finish, spare: Float[Tensor, "n v"] | None, entropy: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
        """See :func:`~opd_lightning.functional.head.triton_rows.statistics`."""
        return triton_rows.statistics(raw, finish, entropy=entropy)

    def gradient(
        self,
        raw: Float[Tensor, "n v"],
        finish: Finish,
        lse: Float[Tensor, " n"],
        pull: Float[Tensor, " n"],
        entropy: Float[Tensor, " n"] | None,
        entropy_pull: Float[Tensor, " n"] | None,
        spare: Float[Tensor, "n v"] | None,
    ) -> Float[Tensor, "n v"]:
        """See :func:`~opd_lightning.functional.head.triton_rows.gradient_`."""
        return triton_rows.gradient_(raw, finish, lse, pull, entropy, entropy_pull)

    products = staticmethod(triton_gather.gather_dot)

    def pull_hidden(
        self, grad: Float[Tensor, "n k"], hidden: Tensor, weight: Tensor, ids: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n hidden"]:
        """See :func:`~opd_lightning.functional.head.triton_gather.gather_backward`."""
        found = triton_gather.gather_backward(grad, hidden, weight, ids, into_hidden=True, into_weight=False)[
            0
        ]
        assert found is not None
        return found

    def pull_weight(
        self, grad: Float[Tensor, "n k"], hidden: Tensor, weight: Tensor, ids: Int[Tensor, "n k"]
    ) -> Float[Tensor, "vocab hidden"]:
        """See :func:`~opd_lightning.functional.head.triton_gather.gather_backward`."""
        found = triton_gather.gather_backward(grad, hidden, weight, ids, into_hidden=False, into_weight=True)[
            1
        ]
        assert found is not None
        return found


def kernels(weight: Float[Tensor, "vocab hidden"]) -> Kernels:
    """Return what works on this head: Triton where it is installed and the head lies on a GPU."""
    return Triton() if triton_rows.available(weight) else Torch()
