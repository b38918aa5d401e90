"""Row operations on a chunk of raw logits in Triton: what the torch ones compute, in fewer passes.

Raw logits are what hidden states times weight gave, in the head's dtype, bias not yet added. They are read
in that dtype, all arithmetic is float32, and there is no other tensor of their size. A chunk may hold some
of the vocabulary's columns only, with ``lse`` and ``entropy`` those of the whole rows. Kernels are imported
with the first call, so that the package works without Triton.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opd_lightning.functional.head.spec import Finish

BLOCK = 4096
"""Most logits that a program holds at once, 16 a thread."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(tensor: Tensor) -> bool:
    """Return whether the functions here run on ``tensor``: at most float32, on CUDA, with Triton installed.

    ``OPD_TRITON=0`` in the environment says no. ``TRITON_INTERPRET=1``, set before Triton is imported, makes
    them run on the CPU, one logit block after the other, for tests.
    """
    there = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return there and tensor.dtype in DTYPES and os.environ.get("OPD_TRITON") != "0" and _installed()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def statistics(
    raw: Float[Tensor, "n v"], finish: Finish, *, entropy: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Return logsumexp(z) and, where asked, the entropy of softmax(z), nats.

    z = cap(scale * (raw + bias)) / temperature,    H = logsumexp(z) - sum_v p_v z_v
    """
    n, v = raw.shape
    lse = torch.empty(n, dtype=torch.float32, device=raw.device)
    h = torch.empty_like(lse) if entropy else None
    numbers, flags = _given(raw, finish)
    _launch(
        "statistics", (n,), raw, _or(finish.bias, raw), lse, _or(h, lse), v, raw.stride(0), *numbers, **flags,
        ENTROPY=entropy, **_block(v, BLOCK),
    )  # fmt: skip
    return lse, h


def gradient_(
    raw: Float[Tensor, "n v"],
    finish: Finish,
    lse: Float[Tensor, " n"],
    grad_lse: Float[Tensor, " n"],
    entropy: Float[Tensor, " n"] | None,
    grad_entropy: Float[Tensor, " n"] | None,
) -> Float[Tensor, "n v"]:
    """Overwrite ``raw`` with the gradient in it of sum(grad_lse * lse) + sum(grad_entropy * H); return it.

    dz_v = p_v grad_lse - grad_entropy p_v (log p_v + H)
    """
    n, v = raw.shape
    numbers, flags = _given(raw, finish)
    with_entropy, h, grad_h = _entropies(entropy, grad_entropy, lse)
    block = _block(v, BLOCK)
    _launch(
        "gradient", (n, -(-v // block["BLOCK"])), raw, _or(finish.bias, raw), lse.contiguous(), h,
        grad_lse.contiguous(), grad_h, v, raw.stride(0), *numbers, **flags, ENTROPY=with_entropy, **block,
    )  # fmt: skip
    return raw


def compare(
    raw_s: Float[Tensor, "n v"],
    finish_s: Finish,
    raw_t: Float[Tensor, "n v"],
    finish_t: Finish,
    beta: float,
    scaled: bool,
    *,
    gradient: bool,
) -> Float[Tensor, " n"]:
    """Return the generalised JSD of whole rows; see :func:`~opd_lightning.functional.divergence.jsd`.

    beta = 0 is KL(T||S), beta = 1 is KL(S||T). With ``gradient``, the gradient of each row's value in its
    raw logits is written over ``raw_s``. A normaliser of each model, the value and the gradient are one
    pass each.
    """
    n, v = raw_s.shape
    of_student, of_teacher = _given(raw_s, finish_s), _given(raw_t, finish_t)
    lse_s = statistics(raw_s, finish_s, entropy=False)[0]
    lse_t = statistics(raw_t, finish_t, entropy=False)[0]
    value, student_kl = torch.empty_like(lse_s), torch.empty_like(lse_s)
    inside = 0.0 < beta < 1.0
    shared = (
        v, raw_s.stride(0), raw_t.stride(0), *of_student[0], *of_teacher[0], beta,
        *((math.log1p(-beta), math.log(beta)) if inside else (0.0, 0.0)),
        1.0 / (beta * (1.0 - beta)) if inside and scaled else 1.0,
    )  # fmt: skip
    flags = {f"{name}_S": flag for name, flag in of_student[1].items()}
    flags |= {f"{name}_T": flag for name, flag in of_teacher[1].items()}
    kind = "mixture" if inside else "reverse" if beta else "forward"
    block = _block(v, BLOCK // 2, inputs=2)
    rows = (raw_s, _or(finish_s.bias, raw_s), lse_s, raw_t, _or(finish_t.bias, raw_t), lse_t)
    _launch("divergence", (n,), *rows, value, student_kl, *shared, **flags, KIND=kind, **block)
    if gradient:
        grid = (n, -(-v // block["BLOCK"]))
        _launch("divergence_gradient", grid, *rows, student_kl, *shared, **flags, KIND=kind, **block)
    return value


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels start where ``tensor`` is, whatever the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _launch(kernel: str, grid: tuple[int, ...], raw: Tensor, /, *args: Any, **constants: Any) -> None:
    from opd_lightning.functional.head import row_kernels

    if raw.stride(1) != 1 and raw.shape[1] > 1:
        raise ValueError(f"a row of logits must be contiguous, got strides {raw.stride()}")
    if all(grid):
        with on_device(raw):
            getattr(row_kernels, kernel)[grid](raw, *args, **constants, enable_fp_fusion=True)


def _block(width: int, most: int, *, inputs: int = 1) -> dict[str, int]:
    """Return a power of two, how much of a row a program holds at once, and its warps: 16 numbers a thread."""
    block = min(most, max(32, 1 << (width - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, inputs * block // 512)}


def _given(raw: Tensor, finish: Finish) -> tuple[tuple[float, float, float], dict[str, bool]]:
    """Return a finish as the kernels take it: scale, softcap, 1 / temperature, and what there is."""
    numbers = (finish.scale, finish.softcap or 1.0, 1.0 / finish.temperature)
    return numbers, {"HAS_BIAS": finish.bias is not None, "HAS_CAP": finish.softcap is not None}


def _entropies(
    entropy: Tensor | None, grad_entropy: Tensor | None, stand_in: Tensor
) -> tuple[bool, Tensor, Tensor]:
    """Return whether the entropy has a gradient, and both tensors, never None."""
    if entropy is None or grad_entropy is None:
        return False, stand_in, stand_in
    return True, entropy.contiguous(), grad_entropy.contiguous()


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return something to point at: a kernel without bias or entropy never reads it."""
    return stand_in if tensor is None else tensor.contiguous()
