"""Which tensors of a vLLM server are not the trainer's, from the digests that it gives of its parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_JOINED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""What vLLM joins along the first axis, in this order, which is also that of a transformers model."""

_EMPTY = hashlib.sha256().hexdigest()
_ROWS = 64
"""vLLM fills the vocabulary's tensors up to a multiple of these rows, with zeros."""


def wrong(trainer: Iterable[tuple[str, Tensor]], served: Mapping[str, str]) -> tuple[list[str], int]:
    """Return the names of the server's tensors that are not byte for byte the trainer's, and how many were compared.

    Compared is what a single worker holds as it was sent: a tensor that it keeps in a layout of its own is empty
    there. Of several workers, each of which may hold a part, nothing is compared.

    Args:
        trainer: weights by their transformers names, in the dtype that was sent.
        served: SHA-256 by ``dp0:pp0:pcp0:tp0:`` and vLLM's name.
    """
    theirs = {place.rpartition(":")[2]: digest for place, digest in served.items()}
    if len(theirs) < len(served):  # several workers
        return [], 0
    wholes: dict[str, list[Tensor]] = {}
    for name, weight in trainer:
        whole = ".".join(_JOINED.get(step, step) for step in name.split("."))
        wholes.setdefault(whole, []).append(weight)
    compared = [name for name in wholes if name in theirs and theirs[name] != _EMPTY]
    return [name for name in compared if theirs[name] not in _digests(name, wholes[name])], len(compared)


def _digests(name: str, parts: list[Tensor]) -> set[str]:
    """Return the digests that a right copy of the joined ``parts`` may have."""
    whole = torch.cat([part.detach().cpu() for part in parts]).contiguous()
    digest = hashlib.sha256(_bytes(whole))
    found = {digest.hexdigest()}
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        digest.update(_bytes(whole.new_zeros(-len(whole) % _ROWS, *whole.shape[1:])))
        found.add(digest.hexdigest())
    return found


def _bytes(weight: Tensor) -> bytes:
    flat: bytes = weight.reshape(-1).view(torch.uint8).numpy().tobytes()
    return flat
