"""Every strategy's yaml: what can be built here is, and what cannot run is refused in a sentence."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from opd_lightning.commands import build
from opd_lightning.errors import ConfigError
from opd_lightning.paths import CONF_DIR


def strategy(name: str, *overrides: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        config = compose("train", [f"strategy={name}", *overrides])
    return build(config.strategy)


def test_fsdp_is_of_all_processes():
    built = strategy("fsdp", "trainer.devices=4", "trainer.num_nodes=3")
    assert isinstance(built, ModelParallelStrategy)
    assert (built._data_parallel_size, built._tensor_parallel_size) == (12, 1)


def test_fsdp1_is_built_without_a_gpu():
    built = strategy("fsdp1", "trainer=gpu")
    assert isinstance(built, FSDPStrategy)
    assert built._state_dict_type == "full"


@pytest.mark.parametrize(("name", "stage"), [("deepspeed", 2), ("deepspeed_2", 2), ("deepspeed_3", 3)])
def test_deepspeed_is_built_without_a_gpu(name, stage):
    pytest.importorskip("deepspeed")
    zero = strategy(name, "trainer=gpu").config["zero_optimization"]
    assert zero["stage"] == stage
    assert "offload_optimizer" not in zero


@pytest.mark.parametrize("name", ["fsdp1", "deepspeed", "deepspeed_2", "deepspeed_3"])
def test_a_cpu_is_refused(name):
    with pytest.raises(
        ConfigError, match=r"`trainer.accelerator` must be gpu .* got 'cpu'; use trainer=gpu, or"
    ):
        strategy(name)


@pytest.mark.parametrize("name", ["fsdp", "fsdp1", "deepspeed_3"])
def test_float16_is_refused(name):
    with pytest.raises(ConfigError, match=r"`trainer.precision` must be .* got '16-mixed'; use bf16-mixed"):
        strategy(name, "trainer=gpu", "trainer.devices=2", "trainer.precision=16-mixed")


def test_a_stage_that_there_is_not():
    with pytest.raises(ConfigError, match=r"`strategy.stage` must be 2 or 3, got 1; use strategy=ddp"):
        strategy("deepspeed", "trainer=gpu", "strategy.stage=1")


def test_an_optimizer_that_cannot_step_on_the_host():
    with pytest.raises(ConfigError, match=r"`optimizer._target_` must be deepspeed.*got 'torch.optim.AdamW'"):
        strategy("deepspeed_3", "trainer=gpu", "strategy.offload_optimizer=true")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"got deepspeed; pip install 'opd-lightning\[deepspeed\]', or use"):
        strategy("deepspeed_3", "trainer=gpu")
