"""What vLLM calls as it starts, in each of its processes: the entry point ``vllm.general_plugins`` names it."""

from __future__ import annotations


def register() -> None:
    """Make ``--weight-transfer-config '{"backend": "opd_gloo"}'`` known to vLLM, once a process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if "opd_gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "opd_gloo", "opd_lightning.engine.vllm_gloo", "GlooWeightTransferEngine"
        )
