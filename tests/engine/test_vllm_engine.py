"""vLLM in this process: the same text and log-probs as the trainer, from weights that are never stale."""

import os
import random
from dataclasses import replace

import pytest
import torch
from torch import distributed as dist

from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.engine.vllm import VllmEngine
from opd_lightning.engine.vllm_adapter import Adapter
from opd_lightning.errors import ConfigError
from opd_lightning.lora import Lora
from opd_lightning.models import load_model
from opd_lightning.types import Finish, PromptBatch, Sampling

from .conftest import ragged
from .test_draw import exact

pytestmark = pytest.mark.vllm
STUDENT = "builtin:word_problems/student"
GREEDY = Sampling(max_new_tokens=24, temperature=0, stop_ids=(2,))
FREE = Sampling(max_new_tokens=16)


def long_prompts(rows=5, length=70) -> PromptBatch:
    """Prompts that fill more than a block of the cache."""
    return ragged(tuple(length + i for i in range(rows)))


@pytest.fixture(scope="module")
def student():
    return load_model(STUDENT, "student.path").eval()


@pytest.fixture(scope="module")
def engine(student):
    # The checks of its own come later: here an error would be the test's to find.
    engine = VllmEngine(rows=16, kv_cache_mb=32, max_model_len=256, check_every=0)
    engine.generate(student, ragged(), GREEDY)
    return engine


@pytest.fixture
def changed(student):
    """The student with other weights inside the test."""
    held = {name: weight.clone() for name, weight in student.state_dict().items()}
    change(student)
    yield student
    with torch.no_grad():
        student.load_state_dict(held)


def change(model, seed=1, size=0.05):
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.add_(size * noise * weight.std())


def teacher_forced(model, prompts, got, **settings):
    """Largest gap to the exact truncated sampler over all drawn tokens, in nats."""
    gap = 0.0
    for row in range(len(prompts)):
        text = got.ids[row][got.mask[row]].tolist()
        prompt = prompts.ids[row][prompts.mask[row]].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        for time, token in enumerate(text):
            want = exact(logits[time], **settings)[token]
            assert want > 0
            gap = max(gap, abs(float(got.behavior_logp[row, time]) - float(torch.tensor(want).log())))
    return gap


def test_greedy_text_is_that_of_the_other_engine(engine, student):
    prompts = ragged(tuple(range(3, 15)))
    want = TransformersEngine().generate(student, prompts, GREEDY)
    got = engine.generate(student, prompts, GREEDY)
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.finish, want.finish)
    assert (got.behavior_logp == 0).all()
    assert len({tuple(row.tolist()) for row in got.ids}) > 6
    assert engine.gap < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 6},
        {"min_p": 0.1},
        {"vocab": 300},
    ],
    ids=str,
)
def test_log_probs_are_those_of_the_sampler_that_drew(settings, engine, student, prompts):
    got = engine.generate(student, prompts, replace(FREE, **settings))
    assert teacher_forced(student, prompts, got, **settings) < 1e-3


def test_top_ids_are_the_students_own_or_left_out(engine, student, prompts):
    for temperature in (1.0, 0.7, 0.0):
        sampling = replace(FREE, top_ids=5, temperature=temperature, stop_ids=(2, 15), vocab=400)
        got = engine.generate(student, prompts, sampling)
        for row in range(len(prompts)):
            text = got.ids[row][got.mask[row]].tolist()
            prompt = prompts.ids[row][prompts.mask[row]].tolist()
            with torch.no_grad():
                logits = student(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1, :400]
            assert torch.equal(got.top_ids[row][got.mask[row]], logits.topk(5).indices)
        assert (got.top_ids[~got.mask] == 0).all()
    # Behind a truncation vLLM ranks only what is left: the collector scores the student then.
    assert engine.generate(student, prompts, replace(FREE, top_ids=5, top_p=0.5)).top_ids is None


def test_no_id_outside_the_shared_vocabulary(engine, student, prompts):
    hot = replace(FREE, temperature=2.0, max_new_tokens=40)
    assert engine.generate(student, prompts, hot).ids.max() >= 100
    assert engine.generate(student, prompts, replace(hot, vocab=100)).ids.max() < 100
    cold = replace(GREEDY, vocab=30)
    got, want = (e.generate(student, prompts, cold) for e in (engine, TransformersEngine()))
    assert torch.equal(got.ids, want.ids)


def test_stop_ids_end_a_row_and_nothing_else_does(engine, student, prompts):
    free = engine.generate(student, prompts, FREE)
    assert (free.finish == Finish.LENGTH).all()
    stops = (int(free.ids[0, 0]), int(free.ids[3, 2]))
    got = engine.generate(student, prompts, replace(FREE, stop_ids=stops))
    for row in range(len(prompts)):
        text = free.ids[row].tolist()
        end = next((i + 1 for i, token in enumerate(text) if token in stops), len(text))
        assert got.ids[row][got.mask[row]].tolist() == text[:end]
        assert int(got.finish[row]) == (Finish.EOS if text[end - 1] in stops else Finish.LENGTH)
    assert (got.ids[~got.mask] == 0).all()
    assert (got.behavior_logp[~got.mask] == 0).all()


def test_a_rows_draws_are_its_seeds_alone(engine, student, prompts):
    whole = engine.generate(student, prompts, FREE)
    again = engine.generate(student, prompts, FREE)
    assert torch.equal(whole.ids, again.ids)
    shuffled = [4, 2, 6, 0, 1]
    part = engine.generate(student, prompts.rows(shuffled), FREE)
    assert torch.equal(part.ids, whole.ids[shuffled])
    other = replace(prompts, seeds=tuple(seed + 1 for seed in prompts.seeds))
    assert not torch.equal(engine.generate(student, other, FREE).ids, whole.ids)
    same = ragged((6,)).repeat(5)
    assert len({tuple(row.tolist()) for row in engine.generate(student, same, FREE).ids}) == 5


def test_changed_weights_are_followed(engine, changed):
    prompts = long_prompts()
    got = engine.generate(changed, prompts, FREE)
    assert teacher_forced(changed, prompts, got) < 1e-3
    change(changed, seed=2)
    moved = engine.generate(changed, prompts, FREE)
    assert teacher_forced(changed, prompts, moved) < 1e-3
    assert teacher_forced(changed, prompts, got) > 1e-2  # the first draw's log-probs are another policy's


def test_unchanged_weights_are_not_sent_again(engine, student, prompts, monkeypatch):
    engine.generate(student, prompts, GREEDY)
    monkeypatch.setattr(Adapter, "push", None)
    engine.generate(student, prompts, GREEDY)


def test_a_skipped_sending_is_known_by_the_version(engine, changed, prompts, monkeypatch):
    monkeypatch.setattr(Adapter, "push", lambda *_: None)
    with pytest.raises(ConfigError, match="hold the weights of this step"):
        engine.generate(changed, prompts, FREE)


@pytest.fixture(scope="module")
def comparing(student):
    engine = VllmEngine(rows=64, kv_cache_mb=32, max_model_len=256, check_every=1)
    engine.generate(student, ragged(), GREEDY)
    return engine


def test_more_prompt_tokens_than_one_step_reads(comparing, student):
    prompts = ragged((200,) * 41)
    got = comparing.generate(student, prompts, replace(FREE, max_new_tokens=4))
    assert teacher_forced(student, prompts, got) < 1e-3


def test_weights_that_did_not_arrive_are_known_by_the_canary(comparing, changed, prompts, monkeypatch):
    llm = comparing._held.adapter.llm
    monkeypatch.setattr(llm, "collective_rpc", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=r"weights that differ: .*norm"):
        comparing.generate(changed, prompts, FREE)


def test_a_tied_head_left_out_is_known_by_the_canary(comparing, changed, prompts, monkeypatch):
    from opd_lightning.engine import vllm

    whole = vllm.weights_of
    monkeypatch.setattr(vllm, "weights_of", lambda m: ((n, w) for n, w in whole(m) if n != "lm_head.weight"))
    with pytest.raises(ConfigError, match=r"one that vLLM repacks, such as a tied head"):
        comparing.generate(changed, prompts, FREE)


def test_a_cache_that_was_not_reset_is_known_by_the_canary(comparing, changed, prompts, monkeypatch):
    change(changed, seed=5)  # what the cache holds may be of the weights as they came
    llm = comparing._held.adapter.llm
    kept, calls = llm.reset_prefix_cache, []
    # The first call is left out; the second belongs to the search for the cause.
    monkeypatch.setattr(llm, "reset_prefix_cache", lambda: calls.append(1) or (len(calls) > 1 and kept()))
    with pytest.raises(ConfigError, match="its prefix cache kept"):
        comparing.generate(changed, prompts, FREE)


def test_adapters_are_merged(student, engine, prompts):
    pytest.importorskip("peft")
    model = load_model(STUDENT, "student.path").eval()
    Lora(rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear").add_to(model, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    adapted = VllmEngine(rows=16, kv_cache_mb=32, max_model_len=256)
    got = adapted.generate(model, prompts, FREE)
    assert teacher_forced(model, prompts, got) < 1e-3
    assert teacher_forced(student, prompts, got) > 1e-2


def test_another_model_is_run_by_the_other_engine(engine, student, prompts):
    teacher = load_model("builtin:word_problems/teacher", "teacher.path").eval()
    got = engine.generate(teacher, prompts, GREEDY)
    assert torch.equal(got.ids, TransformersEngine().generate(teacher, prompts, GREEDY).ids)


def test_the_process_is_left_as_it_was(student, prompts):
    def state():
        return (
            random.getstate(),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.set_num_threads,
            dist.is_initialized(),
            {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")},
            [module.training for module in student.modules()],
        )

    before = state()
    with torch.inference_mode():  # as Lightning evaluates
        fresh = VllmEngine(rows=16, kv_cache_mb=32, max_model_len=256)
        fresh.generate(student, prompts, FREE)
    assert state() == before
    change(student, size=0.0)
    assert teacher_forced(student, prompts, fresh.generate(student, prompts, FREE)) < 1e-3


def test_what_cannot_be_drawn_is_refused(engine, student, prompts):
    with pytest.raises(ConfigError, match=r"engine\.max_model_len"):
        engine.generate(student, prompts, replace(FREE, max_new_tokens=250))
    with pytest.raises(ConfigError, match=r"sampling\.min_p"):
        engine.generate(student, prompts, replace(FREE, min_p=0.1, top_p=0.9))
    with pytest.raises(ConfigError, match=r"sampling\.top_p"):
        engine.generate(student, prompts, replace(FREE, top_p=0))
    assert engine.generate(student, prompts.rows([]), FREE).ids.shape == (0, 0)
