"""Weights on their way to a server by ``engine.transfer``: what is said, what is sent, and what ends in the middle."""

from __future__ import annotations

import base64
import pickle
import socket
import threading
import time
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

from opd_lightning.checks import servers
from opd_lightning.engine import vllm_transfer
from opd_lightning.engine.copies import weights_of
from opd_lightning.engine.gloo import GlooGroup, each_received, free_port
from opd_lightning.engine.vllm_http import Refused, Server
from opd_lightning.engine.vllm_sending import Client, Source
from opd_lightning.engine.vllm_server import VllmServerEngine
from opd_lightning.engine.vllm_transfer import BACKENDS, Transfer, check_transfer
from opd_lightning.errors import ConfigError
from opd_lightning.types import Sampling

from .conftest import build, ragged
from .vllm_stand_in import engine_at, gap, move, standing

FREE = Sampling(max_new_tokens=4)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def model():
    return build("qwen3")


@pytest.fixture
def served(model):
    with standing(config=model.config) as state:
        yield state


@pytest.fixture
def gpu(monkeypatch):
    """A machine of which only the checks know that it has a GPU and vLLM."""
    monkeypatch.setattr(vllm_transfer, "check_installed", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


# -- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"transfer": "nvlink"}, r"`engine\.transfer` must be one of folder, gloo, nccl, ipc, got 'nvlink'"),
        ({"folder": None}, r"`engine\.folder` must name a folder"),
        ({"folder": "", "transfer": "gloo"}, r"`engine\.folder` must name a folder"),
        (
            {"transfer_address": "10.0.0.1"},
            r"`engine\.transfer_address` must be null with engine\.transfer=folder",
        ),
        (
            {"transfer": "gloo", "transfer_address": "a:b"},
            r"`engine\.transfer_address` must be host or host:port",
        ),
        ({"transfer": "gloo", "transfer_address": 5000}, r"must be host or host:port, got 5000"),
        ({"transfer": "gloo", "transfer_address": ":9"}, r"must be host or host:port"),
        ({"transfer": "gloo", "transfer_address": "a:65536"}, r"must be host or host:port"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(settings, words):
    with pytest.raises(ConfigError, match=words) as info:
        VllmServerEngine(**{"url": "http://127.0.0.1:1", "folder": "served"} | settings)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_without_a_gpu_vllms_own_ways_are_refused_as_they_are_named(kind, monkeypatch):
    monkeypatch.setattr(vllm_transfer, "check_installed", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"no CUDA device.*got '{kind}'; use engine\.transfer=gloo"):
        check_transfer(kind, "http://127.0.0.1:8000", None)


def test_ipc_stays_on_this_machine(gpu):
    for here in ("127.0.0.1", "localhost"):
        check_transfer("ipc", f"http://{here}:8000", None)
    with pytest.raises(
        ConfigError, match=r"http://192\.0\.2\.1:8000, which is not on this machine, got 'ipc'"
    ):
        check_transfer("ipc", "http://192.0.2.1:8000", None)
    check_transfer("nccl", "http://192.0.2.1:8000", None)


def test_vllm_finds_the_backend_by_the_packages_entry_point():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = points["vllm.general_plugins"]["opd_lightning"].partition(":")
    assert callable(getattr(import_module(module), name))


# -- the group


def test_tensors_arrive_as_they_are():
    sent = {
        "matrix": torch.randn(3, 5),
        "turned": torch.randn(3, 5).T,
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ids": torch.arange(4),
        "flags": torch.tensor([True, False]),
    }
    place = {"address": "127.0.0.1", "port": free_port("127.0.0.1"), "size": 2, "timeout_s": 20}
    came = {}

    def take():
        dtypes = [str(weight.dtype).removeprefix("torch.") for weight in sent.values()]
        shapes = [list(weight.shape) for weight in sent.values()]
        came.update(each_received(GlooGroup(**place, rank=1), list(sent), dtypes, shapes))

    taker = threading.Thread(target=take)
    taker.start()
    group = GlooGroup(**place, rank=0)
    for weight in sent.values():
        group.send(weight)
    taker.join(20)
    assert came.keys() == sent.keys()
    for name, weight in sent.items():
        assert came[name].dtype == weight.dtype
        assert torch.equal(came[name], weight)
    group.close()
    with pytest.raises(RuntimeError, match="left"):
        group.send(torch.ones(2))


# -- what is said and sent


def test_every_name_is_sent_and_the_routes_come_in_vllms_order(model, served):
    port = free_port("127.0.0.1")
    engine = engine_at(served, None, transfer_address=f"127.0.0.1:{port}")
    engine.follow(model, ragged((3,)))
    whole = dict(weights_of(model))
    assert "lm_head.weight" in served.told["names"]
    assert served.told["names"] == list(whole)
    assert served.told["shapes"] == [list(weight.shape) for weight in whole.values()]
    assert set(served.told["dtype_names"]) == {"float32"}
    sending = [
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/resume",
    ]
    opening = [
        "/pause?mode=wait",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/finish_weight_update",
    ]
    routes = [path for path in served.asked if path != "/inference/v1/generate"]
    assert routes == opening + sending
    assert engine._held.transfer._trainer.group.port == port
    move(model, 0.1)
    engine.follow(model, ragged((3,)))
    assert [path for path in served.asked if path != "/inference/v1/generate"] == [
        *routes,
        "/pause?mode=wait",
        *sending,
    ]
    assert served.version == engine._held.name


def test_the_configuration_is_left_where_the_server_is_started_on_it(model, served, tmp_path):
    engine_at(served, tmp_path / "served", transfer="gloo").follow(model, ragged((3,)))
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["config.json"]


def test_handles_of_a_gpu_go_as_vllms_own_client_sends_them():
    with standing() as state:
        client = Client(Server(url=state.address, timeout_s=20, retries=0, in_flight=1))
        state.deaf = True
        handles = [{"GPU-1": ("function", 3)}]
        with pytest.raises(ConfigError):  # this server takes no handles
            client.update_weights({"names": ["a"], "ipc_handles": handles})
        assert state.told["names"] == ["a"]
        assert pickle.loads(base64.b64decode(state.told["ipc_handles_pickled"])) == handles
        assert "ipc_handles" not in state.told


def test_a_pass_that_is_unlike_the_first_is_not_sent(model, served, monkeypatch):
    real = Source.__iter__
    turned = lambda self: iter(list(real(self))[::-1])  # noqa: E731
    monkeypatch.setattr(Source, "__iter__", turned)
    with pytest.raises(ValueError, match="was to be sent"):
        engine_at(served, None).follow(model, ragged((3,)))


# -- what ends in the middle

UNSET = "Weight transfer not configured. Please set weight_transfer_config to enable weight transfer."


@pytest.mark.parametrize("kind", list(BACKENDS))
def test_a_server_without_the_backend_is_told_the_exact_flag(kind, model, gpu, monkeypatch):
    said = f"Call to collective_rpc method failed: Worker failed with error '{UNSET}', please check the stack trace"

    def opened(kind, info, client, source):
        """As vLLM's trainers, who wait for workers that will not come."""
        threading.Thread(target=client.init_weight_transfer_engine, args=(dict(info),), daemon=True).start()
        time.sleep(60)

    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    monkeypatch.setattr(vllm_transfer, "vllms_own", opened)
    monkeypatch.setattr("torch.cuda.current_device", lambda: None)
    monkeypatch.setattr("opd_lightning.engine.vllm_server.check_device", lambda *_: None)
    with standing(refuses=("/init_weight_transfer_engine", said)) as state:
        begun = time.monotonic()
        with pytest.raises(ConfigError) as info:
            engine_at(state, None, transfer=kind).follow(model, ragged((3,)))
        assert time.monotonic() - begun < 10  # and not when the group's time is over
        flag = f"""start it with --weight-transfer-config '{{"backend": "{BACKENDS[kind]}"}}'"""
        assert f"got {kind!r} and its refusal ({UNSET}); {flag}" in str(info.value)
        assert ("VLLM_ALLOW_INSECURE_SERIALIZATION=1" in str(info.value)) == (kind == "ipc")
        assert state.asked[-1] == "/resume"
        assert state.version == "default"


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_a_student_on_the_cpu_is_not_sent_by_a_gpus_way(kind, model, served, gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.current_device", lambda: None)
    with pytest.raises(ConfigError, match=rf"for a student on the CPU, got '{kind}'; use trainer=gpu"):
        engine_at(served, None, transfer=kind).follow(model, ragged((3,)))
    assert served.asked == []


def test_handles_that_the_server_does_not_open_name_the_flag(model, gpu):
    said = "Set VLLM_ALLOW_INSECURE_SERIALIZATION=1 to load pickled handles"
    transfer = Transfer("ipc", Server(url="http://127.0.0.1:8000", timeout_s=1, retries=0, in_flight=1), None)
    told = str(transfer._refused(Refused("", "/update_weights", said)))
    assert "`engine.transfer` must be what the server" in told
    assert told.endswith("and VLLM_ALLOW_INSECURE_SERIALIZATION=1")


def test_weights_that_are_refused_say_so(model):
    with standing(refuses=("/update_weights", "no such shape"), config=model.config) as state:
        with pytest.raises(
            ConfigError, match=r"refuses its weights at /update_weights.*no such shape.*config\.json"
        ):
            engine_at(state, None).follow(model, ragged((3,)))
        assert state.version == "default"


def test_a_server_that_dies_in_the_middle_and_is_back_gets_all_once_more(model, served):
    engine, prompts = engine_at(served, None), ragged((3, 9))
    engine.generate(model, prompts, FREE)
    for after in (1, 20):
        move(model, 0.2)
        served.dies_after = after
        assert gap(model, prompts, engine.generate(model, prompts, FREE)) < 1e-3
        assert served.dies_after is None


def test_a_server_that_takes_nothing_ends_the_run_in_time(model, served, monkeypatch):
    engine = engine_at(served, None, timeout_s=3)
    engine.follow(model, ragged((3,)))
    move(model, 0.2)
    monkeypatch.setattr(GlooGroup, "send", lambda *_: time.sleep(60))
    begun = time.monotonic()
    words = r"`engine\.url` must be a vLLM server that takes all weights.*no end within 3 s.*\"opd_gloo\""
    with pytest.raises(ConfigError, match=words) as info:
        engine.follow(model, ragged((3,)))
    assert time.monotonic() - begun < 15
    assert "\n" not in str(info.value)
    assert served.version == engine._held.arrived


@pytest.mark.parametrize("address", ["192.0.2.1", "192.0.2.1:5000", "127.0.0.1:{taken}"])
def test_an_address_that_nobody_can_be_met_at_is_named(address, model, served):
    """Before the server waits there."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        named = address.format(taken=holder.getsockname()[1])
        engine = engine_at(served, None, transfer_address=named)
        words = rf"`engine\.transfer_address` must be an address of this machine.*got '{named}'"
        with pytest.raises(ConfigError, match=words):
            engine.follow(model, ragged((3,)))
    assert "/init_weight_transfer_engine" not in served.asked


def test_a_chosen_port_serves_again_and_again(model, served):
    port = free_port("127.0.0.1")
    for _ in range(2):
        engine = engine_at(served, None, transfer_address=f"127.0.0.1:{port}")
        engine.follow(model, ragged((3,)))
        engine._held.transfer.forget()


def test_without_a_folder_a_silent_server_is_refused_before_the_run():
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    engine = VllmServerEngine(url=url, folder=None, transfer="gloo", retries=0, timeout_s=5)
    with pytest.raises(ConfigError, match=rf"`engine\.url` must be a vLLM server.*{url}"):
        list(servers.engine(engine, None, None))
