"""The server's side of ``opd_gloo``, inside vLLM's workers. Importing this module imports vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from opd_lightning.engine.gloo import GlooGroup, each_received


@dataclass(kw_only=True)
class GlooInit(WeightTransferInitInfo):
    """Where the trainer is met; ``size`` counts it and all workers."""

    address: str
    port: int
    size: int
    timeout_s: float


@dataclass(kw_only=True)
class GlooUpdate(WeightTransferUpdateInfo):
    """The tensors that come, in their order."""

    names: Sequence[str]
    dtype_names: Sequence[str]
    shapes: Sequence[Sequence[int]]


class GlooWeightTransferEngine(WeightTransferEngine):
    """Takes weights in the checkpoint's format from the trainer, one tensor after the other, as vLLM's NCCL does."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: torch.nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self.group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Meet the trainer; one that was met before is left."""
        self.shutdown()
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.group = GlooGroup(**vars(init_info), rank=rank)

    def start_weight_update(self) -> None:
        """Have each layer wait for its weights."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the tensors that come; vLLM's own method waits for a device that a CPU build has not."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.shutdown()  # or another worker, who is sent to by this one, would wait for it
            raise
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Load the tensors as they come."""
        if self.group is None:
            raise RuntimeError("the trainer was not met: /init_weight_transfer_engine comes first")
        told = (update_info.names, update_info.dtype_names, update_info.shapes)
        came = ((name, weight.to(self.device)) for name, weight in each_received(self.group, *told))
        with disable_mtp_completeness_check():
            self.model.load_weights(came)
        for _ in came:  # what the model has no use for is on its way all the same
            pass

    def finish_weight_update(self) -> None:
        """Finish the layers that wait for more."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the trainer."""
        group, self.group = self.group, None
        if group is not None:
            group.close()
