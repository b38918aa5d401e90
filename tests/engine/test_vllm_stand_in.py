"""``engine=vllm_server`` beside a server that answers as vLLM 0.32 does: adapters, and log-probs of another kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_lightning.errors import ConfigError
from opd_lightning.lora import Lora
from opd_lightning.types import Sampling

from .conftest import build, ragged
from .vllm_stand_in import engine_at, gap, move, standing

FREE = Sampling(max_new_tokens=6)


@pytest.fixture(params=["folder", "gloo"])
def folder(request, tmp_path):
    """Where the weights are written; None to have them sent by gloo."""
    return tmp_path if request.param == "folder" else None


@pytest.fixture
def served():
    """A server of the plain model's configuration."""
    with standing(config=build("qwen3").config) as state:
        yield state


def adapters(model):
    pytest.importorskip("peft")
    Lora(rank=2, alpha=4.0, dropout=0.0, target_modules="all-linear").add_to(model, seed=0)
    move(model, 0.2, "lora_B")
    return model.eval()


def test_adapters_are_merged_on_their_way_and_followed(make, folder, served):
    model, plain, prompts = adapters(make("qwen3")), make("qwen3"), ragged((3, 9))
    engine = engine_at(served, folder)
    for size in (0.0, 0.2):
        move(model, size, "lora_B")
        for temperature in (1.0, 0.7):
            got = engine.generate(model, prompts, replace(FREE, temperature=temperature))
            assert gap(model, prompts, got, temperature) < 1e-3
            assert gap(plain, prompts, got, temperature) > 1e-2
    assert engine._held.pushes == 2


@pytest.mark.parametrize(("lora", "compared"), [(True, 2), (False, 3)])
def test_with_adapters_each_sending_is_compared(lora, compared, make, folder, served):
    """Weights that do not arrive, under the right version."""
    model, prompts = adapters(make("qwen3")) if lora else make("qwen3"), ragged((3,))
    engine = engine_at(served, folder, check_every=3)
    engine.generate(model, prompts, FREE)
    served.deaf = True
    for _ in range(2, compared):
        move(model, 0.2)
        engine.generate(model, prompts, FREE)
    move(model, 0.2)
    words = rf"within engine\.tolerance.*after {compared} weight updates"
    with pytest.raises(ConfigError, match=words):
        engine.generate(model, prompts, FREE)


def test_a_student_under_autocast_is_compared_as_it_computes_and_sent_as_it_is(make, folder, served):
    """As in `trainer.precision=bf16-mixed`, where log-probs are those of bfloat16 and the weights float32."""
    model, prompts = adapters(make("qwen3")), ragged((3, 9))
    engine = engine_at(served, folder)
    with torch.autocast("cpu", torch.bfloat16):
        engine.generate(model, prompts, FREE)
    assert 1e-3 < engine._held.gap < 0.3
    got = engine.generate(model, prompts, FREE)
    assert engine._held.pushes == 1
    assert gap(model, prompts, got) < 1e-5


def test_it_draws_for_one_student(make, folder, served):
    engine = engine_at(served, folder)
    engine.bind(make("qwen3"), 0)
    with pytest.raises(ConfigError, match="`engine` must draw for one student"):
        engine.bind(make("qwen3"), 1)


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


@pytest.mark.parametrize("at", ["", "/pause?mode=wait", "/inference/v1/generate"])
def test_a_server_that_was_started_again_gets_all_weights_again(at, make, folder, served):
    """Between two collections, as weights are on their way, and while it draws."""
    model, prompts = make("qwen3"), ragged((3, 9))
    engine = engine_at(served, folder, check_every=0)
    before = engine.generate(model, prompts, FREE)
    if at:
        served.restart_at = at
        if at.startswith("/pause"):
            move(model, 0.2)
    else:
        served.restart()
    got = engine.generate(model, prompts, FREE)
    assert not served.restart_at
    assert gap(model, prompts, got) < 1e-3
    assert engine._held.pushes == 2
    if not at and folder is None:
        assert served.asked.count("/update_weights") == 2  # none into a connection that was gone
    assert (got.ids == before.ids).all() or at.startswith("/pause")


def test_what_older_weights_were_to_write_is_refused_of_a_server_that_was_started_again(make, folder, served):
    model, prompts = make("qwen3"), ragged((3,))
    engine = engine_at(served, folder)
    engine.follow(model, prompts)
    move(model, 0.2)
    served.restart()
    with pytest.raises(ConfigError, match=r"`engine\.url` must stay one server.*resume"):
        engine.draw(model, prompts, FREE)


def test_weights_of_another_run_are_refused(make, folder, served):
    model, prompts = make("qwen3"), ragged((3,))
    engine = engine_at(served, folder)
    engine.generate(model, prompts, FREE)
    engine_at(served, folder).generate(model, prompts, FREE)
    with pytest.raises(ConfigError, match=r"write with the weights of version.*a server of its own"):
        engine.generate(model, prompts, FREE)
