"""A vLLM server's tensors against the trainer's."""

import hashlib

import torch

from opd_lightning.engine.digests import wrong


def test_a_servers_tensors_are_told_by_their_digests():
    """Parts that it joins, a vocabulary filled up to 64 rows, tensors kept in another layout, several workers."""

    def digest(*parts: torch.Tensor) -> str:
        return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()

    q, k, v = torch.randn(4, 3), torch.randn(2, 3), torch.randn(2, 3)
    table, norm, out = torch.randn(60, 3), torch.randn(3), torch.randn(3, 4)
    ours = {"h.q_proj.weight": q, "h.k_proj.weight": k, "h.v_proj.weight": v, "o_proj.weight": out}
    ours |= {"embed_tokens.weight": table, "norm.weight": norm}
    held = {"h.qkv_proj.weight": digest(q, k, v), "embed_tokens.weight": digest(table, torch.zeros(4, 3))}
    held |= {"norm.weight": digest(norm), "o_proj.weight": digest(torch.empty(0)), "other": digest(norm)}
    served = {f"dp0:pp0:pcp0:tp0:{name}": value for name, value in held.items()}
    assert wrong(ours.items(), served) == ([], 3)
    assert wrong((ours | {"h.k_proj.weight": k + 1}).items(), served) == (["h.qkv_proj.weight"], 3)
    assert wrong((ours | {"embed_tokens.weight": -table}).items(), served) == (["embed_tokens.weight"], 3)
    halves = [digest(norm[:1]), digest(norm[1:])]
    assert wrong(
        ours.items(), {f"dp0:pp0:pcp0:tp{i}:norm.weight": half for i, half in enumerate(halves)}
    ) == ([], 0)
