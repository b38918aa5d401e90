"""What vLLM's own transfer classes ask of this package, with the classes themselves; no GPU, and no server."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opd_lightning.engine import vllm_transfer
from opd_lightning.engine.gloo import GlooGroup
from opd_lightning.engine.vllm_http import Server
from opd_lightning.engine.vllm_plugin import register
from opd_lightning.engine.vllm_sending import Client
from opd_lightning.types import Sampling

from .conftest import build, ragged
from .vllm_stand_in import engine_at, gap, move, standing

pytestmark = pytest.mark.vllm

FREE = Sampling(max_new_tokens=4)


class OverTcp:
    """In place of a communicator of GPUs."""

    def __init__(self, info):
        place = {"address": info.master_address, "port": info.master_port, "size": info.world_size}
        self.group = GlooGroup(**place, rank=0, timeout_s=30)

    def broadcast(self, tensor, src, stream):
        self.group.send(tensor)

    def destroy(self):
        self.group.close()


def test_vllms_nccl_trainer_sends_through_our_client_and_source(monkeypatch):
    """All of it but the two functions that call NCCL; the weights arrive, twice, and from the start again."""
    from vllm.distributed.weight_transfer import nccl_engine

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", OverTcp)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: None)
    monkeypatch.setattr(vllm_transfer, "check_transfer", lambda *_: None)
    for check in ("check_transfer", "check_device"):
        monkeypatch.setattr(f"opd_lightning.engine.vllm_server.{check}", lambda *_: None)
    model, prompts = build("qwen3"), ragged((3, 9))
    with standing(config=model.config) as state:
        engine = engine_at(state, None, transfer="nccl", check_every=1)
        for _ in range(2):
            assert gap(model, prompts, engine.generate(model, prompts, FREE)) < 1e-3
            move(model, 0.2)
        assert isinstance(engine._held.transfer._trainer, nccl_engine.NCCLTrainerWeightTransferEngine)
        assert nccl_engine.NCCLWeightTransferUpdateInfo(**state.told)
        state.restart()
        assert gap(model, prompts, engine.generate(model, prompts, FREE)) < 1e-3


def test_handles_of_a_gpu_are_read_by_vllms_worker(monkeypatch):
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    with standing(config=build("qwen3").config) as state:
        client = Client(Server(url=state.address, timeout_s=20, retries=0, in_flight=1))
        assert isinstance(client, VLLMWeightSyncClient)
        sent = IPCWeightTransferUpdateInfo(["a"], ["float32"], [[2]], ipc_handles=[{"GPU-1": (0, 1)}])
        with pytest.raises(ValueError, match="engine"):  # this server takes no handles
            client.update_weights(dataclasses.asdict(sent))
        came = {name: value for name, value in state.told.items() if value is not None}
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    assert IPCWeightTransferUpdateInfo(**came).ipc_handles == sent.ipc_handles


def test_vllms_ipc_trainer_is_asked_for_by_its_own_settings(monkeypatch):
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    asked = []
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda info, **more: asked.append(info))
    vllm_transfer.vllms_own("ipc", {}, None, None)
    assert (asked[0].backend, asked[0].rank) == ("ipc", 0)


def test_the_worker_takes_our_words_and_vllm_knows_the_backend():
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    from opd_lightning.engine.vllm_gloo import GlooWeightTransferEngine

    register()
    register()  # vLLM may load plugins more than once a process
    assert WeightTransferEngineFactory._registry["opd_gloo"]() is GlooWeightTransferEngine
    update = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]]}
    worker = GlooWeightTransferEngine.__new__(GlooWeightTransferEngine)
    assert worker.parse_update_info(update).names == ["a"]
    assert torch.equal(torch.tensor(worker.parse_update_info(update).shapes), torch.tensor([[2]]))
    with pytest.raises(ValueError, match="GlooWeightTransferEngine"):
        worker.parse_init_info({"master_address": "127.0.0.1"})
