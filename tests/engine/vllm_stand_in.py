"""A server that answers as vLLM 0.32 does, with a transformers model; in a thread of the tests' process."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from opd_lightning.engine.gloo import GlooGroup, each_received
from opd_lightning.engine.vllm_server import VllmServerEngine

from .conftest import build


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


class Taking:
    """Weights by ``opd_gloo``, as vLLM's worker takes them, with half of them if they end there."""

    def __init__(self, state, config):
        self.state, self.config, self.group = state, config, None

    def __call__(self, path, asked):
        if path == "/init_weight_transfer_engine":
            info = asked["init_info"]
            if "master_address" in info:  # vLLM's own words for it
                place = {"address": info["master_address"], "port": info["master_port"], "timeout_s": 30}
                info = place | {"size": info["world_size"]}
            self.group = GlooGroup(**info, rank=1)
        if path == "/update_weights":
            self.state.told = told = asked["update_info"]
            came = {}
            for name, weight in each_received(self.group, told["names"], told["dtype_names"], told["shapes"]):
                came[name] = weight
                if len(came) == self.state.dies_after:
                    self.state.dies_after = None
                    self.leave()
                    raise ConnectionAbortedError
            if not self.state.deaf:
                self.state.model = AutoModelForCausalLM.from_config(self.config).eval()
                self.state.model.load_state_dict(came)
        if path == "/finish_weight_update" and asked:
            self.state.version = asked["weight_version"]

    def leave(self):
        group, self.group = self.group, None
        if group is not None:
            group.close()


class Standing(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """One that was to die says nothing."""


@contextmanager
def standing(raw: bool = False, without: str = "", refuses: tuple[str, str] = ("", ""), config=None):
    """A server; it takes no new weights while ``deaf``, and says that it has. Its responses lack ``without``.

    It refuses a route with vLLM's words for it, takes weights for ``config`` by gloo, and dies in the middle of
    them ``dies_after`` so many. ``restart`` makes it one that was just started, before the next route or now.
    """
    state = SimpleNamespace(deaf=False, model=None, version="default", address="", asked=[], told={})
    state.dies_after, state.restart_at = None, ""
    taking = Taking(state, config)

    def restart():
        taking.leave()
        state.model, state.version, state.restart_at = build("qwen3", rms_norm_eps=0.1).eval(), "default", ""

    state.restart = restart

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            model = {} if without == "max_model_len" else {"max_model_len": 100}
            self.answer({"data": [model], "weight_version": state.version, "world_size": 1})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(self.path)
            if state.restart_at == self.path:
                restart()
            if self.path == refuses[0]:
                return self.answer({"error": {"message": refuses[1]}}, 500)
            if self.path == "/collective_rpc" and not state.deaf:
                state.model = AutoModelForCausalLM.from_pretrained(asked["kwargs"]["weights_path"]).eval()
            if self.path == "/update_weight_version":
                state.version = asked["new_version"]
            taking(self.path, asked)
            if self.path != "/inference/v1/generate":
                return self.answer({})
            spans = {"weight_versions": [{"version": state.version}]}
            choice = written(state.model, asked, raw) | spans
            choice.pop(without, None)
            return self.answer({"choices": [choice]})

        def answer(self, body, status=200):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    with Standing(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        state.address = f"http://127.0.0.1:{server.server_port}"
        yield state
        taking.leave()
        server.shutdown()


def engine_at(state, folder, **more) -> VllmServerEngine:
    """An engine for it; without a ``folder`` it sends by gloo."""
    settings = {"in_flight": 4, "retries": 0, "timeout_s": 30}
    settings |= {"folder": None, "transfer": "gloo"} if folder is None else {"folder": str(folder)}
    return VllmServerEngine(url=state.address, **settings | more)


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
