"""``engine=vllm_server`` beside a server that answers as vLLM 0.32 does: adapters, and log-probs of another kind."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_lightning.engine.vllm_server import VllmServerEngine
from opd_lightning.errors import ConfigError
from opd_lightning.lora import Lora
from opd_lightning.types import Sampling

from .conftest import ragged

FREE = Sampling(max_new_tokens=6)


def written(model, asked, raw: bool) -> dict:
    """One response and its log-probs: of the sampler, or with ``raw`` of the model at temperature 1."""
    params, ids = asked["sampling_params"], list(asked["token_ids"])
    draws, content = torch.Generator().manual_seed(params["seed"]), []
    for _ in range(params["max_tokens"]):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        logp = (logits / params["temperature"]).log_softmax(-1)
        ids.append(int(torch.multinomial(logp.exp(), 1, generator=draws)))
        said = logits.log_softmax(-1) if raw else logp
        content.append({"logprob": float(said[ids[-1]]), "top_logprobs": []})
    return {"token_ids": ids[-len(content) :], "logprobs": {"content": content}, "finish_reason": "length"}


@contextmanager
def standing(raw: bool = False, without: str = ""):
    """A server; it takes no new weights while ``deaf``, and says that it has. Its responses lack ``without``."""
    state = SimpleNamespace(deaf=False, model=None, version="", address="")

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{} if without == "max_model_len" else {"max_model_len": 100}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/collective_rpc" and not state.deaf:
                state.model = AutoModelForCausalLM.from_pretrained(asked["kwargs"]["weights_path"]).eval()
            if self.path == "/update_weight_version":
                state.version = asked["new_version"]
            if self.path != "/inference/v1/generate":
                return self.answer({})
            spans = {"weight_versions": [{"version": state.version}]}
            choice = written(state.model, asked, raw) | spans
            choice.pop(without, None)
            return self.answer({"choices": [choice]})

        def answer(self, body):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        state.address = f"http://127.0.0.1:{server.server_port}"
        yield state
        server.shutdown()


def engine_at(state, folder, **more) -> VllmServerEngine:
    settings = {"in_flight": 4, "retries": 0, "timeout_s": 30}
    return VllmServerEngine(url=state.address, folder=str(folder), **settings | more)


def move(model, size: float, named: str = "") -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if named in name:
                weight += size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))


def gap(model, prompts, got, temperature: float = 1.0) -> float:
    """Largest difference between the log-probs that came and the model's own, in nats."""
    found = []
    for row in range(len(prompts)):
        prompt, text = prompts.ids[row][prompts.mask[row]], got.ids[row]
        with torch.no_grad():
            logits = model(torch.cat([prompt, text])[None]).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1).gather(-1, text[:, None])[:, 0]
        found.append(float((logp - got.behavior_logp[row]).abs().max()))
    return max(found)


def adapters(model):
    pytest.importorskip("peft")
    Lora(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear").add_to(model, seed=0)
    move(model, 0.2, "lora_B")
    return model.eval()


def test_adapters_are_merged_on_their_way_and_followed(make, tmp_path):
    model, plain, prompts = adapters(make("qwen3")), make("qwen3"), ragged((3, 9))
    with standing() as state:
        engine = engine_at(state, tmp_path)
        for size in (0.0, 0.2):
            move(model, size, "lora_B")
            for temperature in (1.0, 0.7):
                got = engine.generate(model, prompts, replace(FREE, temperature=temperature))
                assert gap(model, prompts, got, temperature) < 1e-3
                assert gap(plain, prompts, got, temperature) > 1e-2
        assert engine._held.pushes == 2


@pytest.mark.parametrize(("lora", "compared"), [(True, 2), (False, 3)])
def test_with_adapters_each_sending_is_compared(lora, compared, make, tmp_path):
    """Weights that do not arrive, under the right version."""
    model, prompts = adapters(make("qwen3")) if lora else make("qwen3"), ragged((3,))
    with standing() as state:
        engine = engine_at(state, tmp_path, check_every=3)
        engine.generate(model, prompts, FREE)
        state.deaf = True
        for _ in range(2, compared):
            move(model, 0.2)
            engine.generate(model, prompts, FREE)
        move(model, 0.2)
        words = rf"within engine\.tolerance.*after {compared} weight updates"
        with pytest.raises(ConfigError, match=words):
            engine.generate(model, prompts, FREE)


def test_raw_log_probs_are_refused(make, tmp_path):
    """They would be taken for those of the sampler, which importance weights divide by."""
    with standing(raw=True) as state:
        with pytest.raises(ConfigError, match=r"`engine\.url`.*--logprobs-mode processed_logprobs") as info:
            engine_at(state, tmp_path).generate(make("qwen3"), ragged(), FREE)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("without", ["max_model_len", "weight_versions", "logprobs", "token_ids"])
def test_a_server_of_another_kind_is_one_sentence(without, make, tmp_path):
    with standing(without=without) as state:
        with pytest.raises(ConfigError, match=rf"must be a vLLM server.*{without}") as info:
            engine_at(state, tmp_path).generate(make("qwen3"), ragged((3,)), FREE)
        assert "\n" not in str(info.value)
