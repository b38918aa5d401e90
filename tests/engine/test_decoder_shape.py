"""Which models the fast decoder takes, and what happens to the others."""

import socket

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from opd_lightning.engine.cache import survivors
from opd_lightning.engine.decoder import read
from opd_lightning.engine.shape import agrees, supports
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.types import Sampling

from .conftest import FAMILIES, ragged

GREEDY = Sampling(max_new_tokens=8, temperature=0)


def loop(model, prompts):
    return TransformersEngine(method="loop").generate(model, prompts, GREEDY).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_families(family, make):
    assert supports(make(family)) == (not family.startswith("gemma"))


class _Adapted(nn.Linear):
    pass


def _adapt(model):
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = _Adapted(old.in_features, old.out_features, bias=False)


def _replace(model):
    model.model.layers[0].mlp.gate_proj = nn.Sequential(model.model.layers[0].mlp.gate_proj)


def _hook(model):
    model.model.norm.register_forward_hook(lambda *_: None)


def _patch(model):
    model.model.layers[0].forward = model.model.layers[0].forward


def _parametrize(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)


@pytest.mark.parametrize("change", [_adapt, _replace, _hook, _patch, _parametrize])
def test_a_changed_model_is_refused(change, make, prompts):
    model = make("qwen3")
    assert supports(model)
    change(model)
    assert not supports(model)
    with pytest.raises(ConfigError, match=r"engine\.method"):
        loop(model, prompts)
    assert TransformersEngine().generate(model, prompts, GREEDY).ids.shape == (7, 8)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
    ids=["window", "dynamic-rope"],
)
def test_a_config_beyond_the_decoder_is_refused(settings, make):
    assert not supports(make("qwen3", **settings))


def test_a_model_that_computes_something_else_is_found_out(make, prompts):
    model = make("qwen3")
    norm = model.model.layers[0].input_layernorm

    class Odd(type(norm)):
        def forward(self, x):
            return 2 * super().forward(x)

    norm.__class__ = Odd
    assert supports(model)  # nothing to see from outside
    with pytest.warns(UserWarning, match="does not reproduce"):
        got = TransformersEngine().generate(model, prompts, GREEDY).ids
    assert torch.equal(got, TransformersEngine(method="generate").generate(model, prompts, GREEDY).ids)


@pytest.mark.parametrize("lengths", [(3, 9, 1, 14), (5, 5), (1, 1), (4,)])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_the_comparison_holds_in_every_precision(mode, lengths, make):
    model, prompts = make("qwen2"), ragged(lengths)
    if mode == "bfloat16":
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        decoder = read(model)
        assert agrees(model, decoder, prompts.ids, prompts.mask)
        assert TransformersEngine(method="loop").generate(model, prompts, GREEDY).ids.shape[1] == 8


def test_every_query_may_look_at_something(make, prompts, monkeypatch):
    attend, masks = F.scaled_dot_product_attention, []

    def spy(*args, attn_mask=None):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        read(make("qwen2")).prefill(prompts.ids, prompts.mask, 1)
    # Some kernels answer a query without any key with nan, which reaches every row through 0 * nan.
    assert all(mask.any(-1).all() for mask in masks)


def test_survivors_moves_the_last_rows_into_the_gaps():
    done = torch.tensor([True, False, True, False, False, True, False])
    assert survivors(done, 4).tolist() == [4, 1, 6, 3]
    assert survivors(torch.zeros(3, dtype=torch.bool), 3).tolist() == [0, 1, 2]


@pytest.fixture
def one_process():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_taken_once_they_are_gathered(make, prompts):
    model = make("qwen3")
    want = loop(model, prompts)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert not supports(model)
    modules = [model, *model.model.layers]
    with torch.no_grad():
        model(prompts.ids)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    assert supports(model)
    assert torch.equal(loop(model, prompts), want)
