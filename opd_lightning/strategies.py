"""Lightning strategies that need more than a name."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from opd_lightning.errors import ConfigError, require
from opd_lightning.layers import named_weights
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.sharding import partitioned, unsharded


def fsdp(devices: int | str, num_nodes: int, precision: str | int) -> ModelParallelStrategy:
    """Return FSDP2 over all processes: ``devices * num_nodes`` shards, one checkpoint file.

    Raises:
        ConfigError: a number of devices that is not known, or float16.
    """
    _refuse_half("fsdp", precision)
    local = torch.cuda.device_count() if devices in ("auto", -1, "-1") else devices
    require(
        isinstance(local, int) and local >= 1,
        "trainer.devices",
        "be a number with strategy=fsdp",
        devices,
        "use trainer.devices=8",
    )
    return ModelParallelStrategy(
        data_parallel_size=int(local) * num_nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def fsdp1(accelerator: str, precision: str | int) -> FSDPStrategy:
    """Return FSDP1 over all processes, which Lightning runs on GPUs alone.

    Raises:
        ConfigError: another accelerator, or float16.
    """
    _refuse_cpu("fsdp1", accelerator)
    _refuse_half("fsdp1", precision)
    return WrappedStudent()


def deepspeed(
    accelerator: str, precision: str | int, stage: int, offload_optimizer: bool, optimizer: str
) -> DeepSpeedStrategy:
    """Return DeepSpeed's ZeRO, which Lightning runs on GPUs alone.

    Args:
        accelerator: of the trainer; ``precision`` too.
        stage: 2 shards gradients and optimizer state, 3 the weights as well.
        offload_optimizer: keep the optimizer's state in the host's memory and step there.
        optimizer: the optimizer's class, by name.

    Raises:
        ConfigError: another accelerator, float16, no such stage, an optimizer that cannot step on the host, or
            DeepSpeed is not installed.
    """
    _refuse_cpu("deepspeed", accelerator)
    _refuse_half("deepspeed", precision)
    require(stage in (2, 3), "strategy.stage", "be 2 or 3", stage, "use strategy=ddp for no sharding")
    on_host = not offload_optimizer or optimizer.endswith("DeepSpeedCPUAdam")
    require(
        on_host,
        "optimizer._target_",
        "be deepspeed.ops.adam.DeepSpeedCPUAdam with strategy.offload_optimizer=true",
        optimizer,
        "use that one, or strategy.offload_optimizer=false",
    )
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "`strategy` must be one that is installed, got deepspeed; pip install 'opd-lightning[deepspeed]', or use "
            "strategy=fsdp, which shards as ZeRO-3 does"
        )
    return PartitionedStudent(stage=stage, offload_optimizer=offload_optimizer, logging_batch_size_per_gpu=1)


def slurm() -> SLURMEnvironment:
    """Return the environment of a run that srun has started: its processes are SLURM's, and resuming is ours.

    Raises:
        ConfigError: srun has not started this process.
    """
    if "SLURM_NTASKS" not in os.environ:
        raise ConfigError(
            "`trainer` must be cpu or gpu outside of a SLURM job, got slurm; start the command by srun inside a batch "
            "script (docs/scale.md), or use trainer=gpu"
        )
    return SLURMEnvironment(auto_requeue=False)


def _refuse_cpu(name: str, accelerator: str) -> None:
    remedy = "use trainer=gpu, or strategy=fsdp, which runs on CPUs too"
    require(
        accelerator in ("gpu", "cuda"),
        "trainer.accelerator",
        f"be gpu with strategy={name}",
        accelerator,
        remedy,
    )


def _refuse_half(name: str, precision: str | int) -> None:
    wide = str(precision) != "16-mixed"
    condition = f"be 32-true or bf16-mixed with strategy={name}, which has no loss scaling here"
    require(wide, "trainer.precision", condition, precision, "use bf16-mixed")


class _WrappedPrecision(FSDPPrecision):
    """FSDP1's precision for batches that are frozen values, and a clipping by the norm over all shards."""

    def __init__(self, precision: Any, strategy: FSDPStrategy) -> None:
        super().__init__(precision)
        self.strategy = strategy

    def convert_input(self, data: Any) -> Any:
        """Leave a batch as it is: autocast decides what is computed in."""
        return data

    def clip_grad_by_norm(self, *given: Any, **named: Any) -> None:
        """Clip by the norm over all ranks, which the wrapper around the student knows."""
        value = given[1] if len(given) > 1 else named["clip_val"]
        module = self.strategy.lightning_module
        assert isinstance(module, OnPolicyDistillation)
        module.student.clip_grad_norm_(float(value))  # type: ignore[operator]


class WrappedStudent(FSDPStrategy):
    """FSDP1 around the student that the module wraps itself, its scorer being the root."""

    @property
    def precision_plugin(self) -> FSDPPrecision:
        """The trainer's precision."""
        plugin = self._precision_plugin
        return plugin if isinstance(plugin, FSDPPrecision) else _WrappedPrecision("32-true", self)

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        """Set it."""
        named = None if plugin is None else _WrappedPrecision(getattr(plugin, "precision", "32-true"), self)
        self._precision_plugin = named

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights under their plain names on the first process, nothing on the others."""
        module = self.lightning_module
        assert isinstance(module, OnPolicyDistillation)
        with unsharded(module.scorer):
            weights = named_weights(module.scorer) if self.is_global_zero else ()
            return {f"student.{name}": weight.detach().cpu().clone() for name, weight in weights}


class _PartitionedPrecision(DeepSpeedPrecision):
    """DeepSpeed's precision for batches that are frozen values, and a loss divided once."""

    def convert_input(self, data: Any) -> Any:
        """Leave a batch as it is: the head computes in float32, whatever the weights are."""
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *given: Any, **named: Any) -> None:
        """Run the engine's backward pass on a loss that Lightning has divided by the micro-batches already."""
        model.trainer.model.backward(tensor, *given, scale_wrt_gas=False, **named)


class PartitionedStudent(DeepSpeedStrategy):
    """DeepSpeed around the module, from the first training on.

    Nothing but training calls the module: evaluation answers in its loader. Lightning would make another
    engine for every evaluation, with hooks of its own on the same partitioned weights.
    """

    @property
    def precision_plugin(self) -> Precision:
        """The trainer's precision."""
        plugin = self._precision_plugin
        return plugin if plugin is not None else _PartitionedPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        """Set it."""
        self._precision_plugin = (
            None if plugin is None else _PartitionedPrecision(getattr(plugin, "precision", "32-true"))
        )

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Build nothing that is cut at once: the models are loaded before a strategy is set up."""
        yield

    def init_deepspeed(self) -> None:
        """Make the engine at the first training, and leave the module alone for an evaluation."""
        module = self.lightning_module
        assert module is not None
        if module.trainer.training:
            super().init_deepspeed()
        elif not self._made:
            module.to(self.root_device)

    _made = False

    def _setup_model_and_optimizer(self, *given: Any, **named: Any) -> Any:
        made = super()._setup_model_and_optimizer(*given, **named)
        self._made = True
        module = self.lightning_module
        assert isinstance(module, OnPolicyDistillation)
        if self.zero_stage_3:
            partitioned(module.scorer)
        return made

    def teardown(self) -> None:
        """Leave the weights on their devices: what is partitioned is read once more, to be saved."""
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
