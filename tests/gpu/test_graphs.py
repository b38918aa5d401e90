"""The decoder's steps as CUDA graphs: recorded indeed, and with the tokens of steps that are launched one by one."""

import gc
import warnings
from dataclasses import replace

import pytest
import torch
from engine.conftest import FAMILIES, build, ragged

from opd_lightning.engine import cache, loops, static
from opd_lightning.engine.decoder import read
from opd_lightning.engine.recording import CudaGraphs, plainly
from opd_lightning.engine.sampling import row_uniforms
from opd_lightning.engine.static import StaticDecoder
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.types import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA, DEVICE = "cuda", torch.device("cuda", 0)
FAST = [name for name in FAMILIES if not name.startswith("gemma")]
SAMPLED = Sampling(max_new_tokens=60, temperature=0.9, top_p=0.9, stop_ids=(5,), top_ids=4)


@pytest.fixture
def prompts():
    return ragged().to(CUDA)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 16)


def drawn(model, prompts, sampling, graphs):
    engine = TransformersEngine(method="loop", batch_size=4, graphs=graphs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graph")  # what a failed capture says
        return engine.generate(model, prompts, sampling)


def same(got, want):
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.finish, want.finish)
    assert torch.equal(got.top_ids, want.top_ids)
    assert torch.allclose(got.behavior_logp, want.behavior_logp, atol=1e-4)


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 1.0, "stop_ids": ()}], ids=str)
def test_tokens_are_those_without(family, settings, prompts):
    model, sampling = build(family).to(CUDA), replace(SAMPLED, **settings)
    for turn in range(3):  # collections, and weights changed in between
        same(drawn(model, prompts, sampling, True), drawn(model, prompts, sampling, False))
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(turn))
                weight.add_(0.1 * noise.to(weight))


def test_graphs_come_and_go(prompts, monkeypatch):
    """One shape kept, so that nearly every graph is dropped while others of its memory live."""
    monkeypatch.setattr(static, "_KEPT", 1)
    model = build("qwen3").to(CUDA)
    for _ in range(3):
        same(drawn(model, prompts, SAMPLED, True), drawn(model, prompts, SAMPLED, False))


@torch.no_grad()
def test_a_step_is_recorded_and_replayed(prompts):
    decoder, played = read(build("qwen3").to(CUDA)), []
    uniforms = row_uniforms(prompts.seeds, SAMPLED.max_new_tokens).to(CUDA)
    for record in (CudaGraphs(DEVICE), plainly):
        fixed = StaticDecoder(decoder, rows=7, slots=80, record=record)
        played.append(loops.decode(fixed, prompts.ids, prompts.mask, uniforms, replace(SAMPLED, stop_ids=())))
        if isinstance(record, CudaGraphs):
            assert record.first is not None
            assert not record.failed
            assert all(step.graph is not None for step in fixed.steps.values())
            assert len(fixed.steps) == 1
    same(*played)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_logits_in_half_precision(mode, prompts):
    model = build("qwen3").to(CUDA)
    if mode == "bfloat16":
        model.bfloat16()
    with torch.autocast(CUDA, torch.bfloat16, enabled=mode == "autocast"):
        decoder, graphs = read(model), CudaGraphs(DEVICE)
        fixed = StaticDecoder(decoder, rows=7, slots=24, record=graphs)
        (_, state), (_, mine) = (d.prefill(prompts.ids, prompts.mask, 10) for d in (decoder, fixed))
        for token in range(10):
            ids = torch.full((7,), token, device=CUDA)
            (want, state), (got, mine) = decoder.step(ids, state), fixed.step(ids, mine)
            assert torch.allclose(got, want, atol=0.1 * float(want.float().abs().amax()))
        assert not graphs.failed


def test_the_memory_goes_back(prompts):
    model = build("qwen3").to(CUDA)
    drawn(model, prompts, SAMPLED, True)  # what a first run loads stays
    gc.collect()
    before = torch.cuda.memory_allocated()
    drawn(model, prompts, SAMPLED, True)
    assert torch.cuda.memory_allocated() == before


@torch.no_grad()
def test_with_two_models(prompts):
    student, teacher = build("qwen3").to(CUDA), build("qwen2").to(CUDA)

    def combine(s, t):
        return torch.log(0.5 * s.exp() + 0.5 * t.exp())

    same(
        *(
            TransformersEngine(method="loop", batch_size=4, graphs=graphs).generate_mixed(
                student, teacher, prompts, SAMPLED, combine
            )
            for graphs in (True, False)
        )
    )
