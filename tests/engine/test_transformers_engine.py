"""The engine: two ways of decoding, the library's own greedy search and a teacher-forced forward agree."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import GenerationConfig

from opd_lightning.engine import cache
from opd_lightning.engine.decoder import Decoder
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.protocols import Engine
from opd_lightning.types import Finish, Generation, Sampling

from .conftest import FAMILIES, VOCAB, ragged
from .test_draw import exact

FAST = [name for name in FAMILIES if not name.startswith("gemma")]
GREEDY = Sampling(max_new_tokens=12, temperature=0, stop_ids=(5, 11))
SAMPLED = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, stop_ids=(5, 11), top_ids=4)


def run(model, prompts, sampling, method="auto", batch_size=4) -> Generation:
    return TransformersEngine(batch_size=batch_size, method=method).generate(model, prompts, sampling)


def texts(generation: Generation) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(generation.ids, generation.mask, strict=True)]


def cut(text: list[int], stop_ids) -> list[int]:
    end = next((i + 1 for i, token in enumerate(text) if token in stop_ids), len(text))
    return text[:end]


def library_greedy(model, prompts, sampling) -> list[list[int]]:
    """Hugging Face's own greedy search, one call, nothing of ours."""
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=0,
    )
    with torch.no_grad():
        out = model.generate(
            input_ids=prompts.ids, attention_mask=prompts.mask.long(), generation_config=settings
        )
    return [cut(row.tolist(), sampling.stop_ids) for row in out[:, prompts.ids.shape[1] :]]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_librarys(family, make, prompts):
    model = make(family)
    want = library_greedy(model, prompts, GREEDY)
    assert len({tuple(text) for text in want}) > 4  # the rows differ, or the comparison says little
    for method in ["generate", "loop"] if family in FAST else ["generate", "auto"]:
        got = run(model, prompts, GREEDY, method)
        assert texts(got) == want
        assert (got.behavior_logp == 0).all()


@pytest.mark.parametrize("family", FAST)
def test_sampled_text_is_the_same_by_either_method(family, make, prompts):
    model = make(family)
    fast, slow = run(model, prompts, SAMPLED, "loop"), run(model, prompts, SAMPLED, "generate")
    assert torch.equal(fast.ids, slow.ids)
    assert torch.equal(fast.mask, slow.mask)
    assert torch.equal(fast.finish, slow.finish)
    assert torch.equal(fast.top_ids, slow.top_ids)
    assert torch.allclose(fast.behavior_logp, slow.behavior_logp, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5, "top_p": 0.8},
        {"temperature": 1.4, "min_p": 0.05, "vocab": 30},
    ],
    ids=str,
)
def test_log_probs_and_top_ids_are_those_of_a_teacher_forced_forward(family, settings, make, prompts):
    model = make(family)
    sampling = Sampling(max_new_tokens=8, stop_ids=(5,), top_ids=3, **settings)
    got = run(model, prompts, sampling)
    for row, text in enumerate(texts(got)):
        prompt = prompts.ids[row][prompts.mask[row]].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        for time, token in enumerate(text):
            want = torch.tensor(exact(logits[time], **settings))
            assert want[token] > 0
            assert float(got.behavior_logp[row, time]) == pytest.approx(float(want[token].log()), abs=1e-4)
            top = logits[time, : sampling.vocab].topk(3).indices
            assert got.top_ids[row, time].tolist() == top.tolist()


@pytest.mark.parametrize("method", ["loop", "generate"])
def test_a_row_does_not_depend_on_its_company(method, qwen3, prompts):
    whole = texts(run(qwen3, prompts, SAMPLED, method, batch_size=99))
    for batch_size in (1, 3):
        assert texts(run(qwen3, prompts, SAMPLED, method, batch_size)) == whole
    shuffled = [4, 2, 6, 0, 1]
    assert texts(run(qwen3, prompts.rows(shuffled), SAMPLED, method)) == [whole[i] for i in shuffled]


def test_seeds_alone_tell_equal_prompts_apart(qwen3):
    prompts = ragged((6,)).repeat(5)
    free = replace(SAMPLED, stop_ids=())
    first = texts(run(qwen3, prompts, free))
    assert len({tuple(text) for text in first}) == 5
    assert (
        texts(run(qwen3, replace(prompts, seeds=(9,) * 5), free))
        == [texts(run(qwen3, replace(prompts, seeds=(9,) * 5), free))[0]] * 5
    )


def test_a_longer_budget_changes_no_token(qwen3, prompts):
    short, long = run(qwen3, prompts, replace(SAMPLED, max_new_tokens=3)), run(qwen3, prompts, SAMPLED)
    assert texts(short) == [text[:3] for text in texts(long)]


@pytest.mark.parametrize("method", ["loop", "generate"])
def test_stop_ids_end_a_row_where_the_first_of_them_stands(method, qwen3, prompts):
    free = texts(run(qwen3, prompts, replace(SAMPLED, stop_ids=()), method))
    assert {len(text) for text in free} == {12}
    # One row ends with its first token, one with its third, one with the very last.
    for stop_ids in ((free[0][0],), (free[0][0], free[3][2]), (free[1][11],)):
        got = run(qwen3, prompts, replace(SAMPLED, stop_ids=stop_ids), method)
        want = [cut(text, stop_ids) for text in free]
        assert texts(got) == want
        ended = [Finish.EOS if text[-1] in stop_ids else Finish.LENGTH for text in want]
        assert got.finish.tolist() == ended
        assert got.ids.shape[1] == max(map(len, want))
        assert (got.mask.int().diff(dim=1) <= 0).all()  # padding is on the right


@pytest.mark.parametrize("method", ["loop", "generate"])
def test_one_token_and_all_rows_ending_at_once(method, qwen3, prompts):
    one = run(qwen3, prompts, replace(SAMPLED, max_new_tokens=1), method)
    assert one.mask.tolist() == [[True]] * 7
    every = run(qwen3, prompts, replace(SAMPLED, stop_ids=tuple(range(VOCAB))), method)
    assert torch.equal(every.ids, one.ids)
    assert (every.finish == Finish.EOS).all()


def test_finished_rows_cost_nothing(make, prompts, monkeypatch):
    model, fed, step = make("qwen3"), [], Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self, ids, state: fed.append(len(ids)) or step(self, ids, state)
    )
    agrees_first = run(model, prompts, SAMPLED, "loop")  # compares the decoder with the model, once
    fed.clear()
    got = run(model, prompts, SAMPLED, "loop")
    assert torch.equal(got.ids, agrees_first.ids)
    # Every token but a row's last is fed back, once.
    assert sum(fed) == int(got.mask.sum()) - len(prompts)


def test_the_librarys_loop_ends_with_the_longest_row(make, prompts):
    model, calls = make("qwen3"), []
    free = texts(run(model, prompts, replace(SAMPLED, stop_ids=())))
    stop_ids = tuple({text[3] for text in free})
    model.register_forward_hook(lambda *_: calls.append(1))
    got = run(model, prompts, replace(SAMPLED, stop_ids=stop_ids), "generate", batch_size=9)
    assert len(calls) == got.ids.shape[1] <= 4


@pytest.mark.parametrize("method", ["loop", "generate"])
def test_padding_holds_zeros(method, qwen3, prompts):
    got = run(qwen3, prompts, SAMPLED, method)
    assert not got.mask.all()
    for tensor in (got.ids, got.behavior_logp, got.top_ids):
        assert (tensor[~got.mask] == 0).all()


# numerics 11.25
@pytest.mark.parametrize("method", ["loop", "generate"])
def test_no_id_outside_the_shared_vocabulary(method, qwen3, prompts):
    got = run(qwen3, prompts, Sampling(max_new_tokens=20, temperature=3.0, vocab=7, top_ids=7), method)
    assert set(got.ids[got.mask].tolist()) == set(range(7))
    assert got.top_ids.max() == 6


@pytest.mark.parametrize("method", ["loop", "generate"])
def test_changed_weights_are_seen_at_once(method, make, prompts):
    model = make("qwen3")
    before = texts(run(model, prompts, GREEDY, method))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    after = texts(run(model, prompts, GREEDY, method))
    assert after != before
    assert after == library_greedy(model, prompts, GREEDY)


def test_the_cache_grows_without_a_trace(qwen3, prompts, monkeypatch):
    sampling = replace(SAMPLED, max_new_tokens=40)
    want = run(qwen3, prompts, sampling, "loop")
    monkeypatch.setattr(cache, "BLOCK", 5)
    got = run(qwen3, prompts, sampling, "loop")
    assert torch.equal(got.ids, want.ids)
    assert torch.allclose(got.behavior_logp, want.behavior_logp, atol=1e-5)


@pytest.mark.parametrize("method", ["loop", "generate"])
def test_the_model_is_left_as_it_was(method, make, prompts):
    model = make("qwen3", attention_dropout=0.5)
    model.train()
    model.lm_head.eval()
    model.generation_config.repetition_penalty = 9.0  # a setting of the model's own must not be applied
    held = model.generation_config
    got = run(model, prompts, GREEDY, method)
    assert model.training
    assert model.model.training
    assert not model.lm_head.training
    assert model.generation_config is held
    assert not got.behavior_logp.requires_grad
    assert not got.ids.is_inference()
    held.repetition_penalty = 1.0
    assert texts(got) == library_greedy(model.eval(), prompts, GREEDY)


def test_no_rows_give_no_rows(qwen3, prompts):
    got = run(qwen3, prompts.rows([]), SAMPLED)
    assert (got.ids.shape, got.top_ids.shape, got.finish.shape) == ((0, 0), (0, 0, 4), (0,))


def test_settings_are_refused_before_anything_runs(qwen3, prompts):
    with pytest.raises(ConfigError, match=r"sampling\.top_p"):
        run(qwen3, prompts, Sampling(max_new_tokens=1, top_p=0))
    with pytest.raises(ConfigError, match=r"engine\.batch_size"):
        TransformersEngine(batch_size=0)
    with pytest.raises(ConfigError, match=r"engine\.method"):
        TransformersEngine(method="vllm")
    with pytest.raises(ConfigError, match="prompts"):
        run(qwen3, replace(prompts, mask=torch.zeros_like(prompts.mask)), GREEDY)


def test_the_yaml_builds_an_engine():
    folder = Path(__file__).parents[2] / "conf" / "engine"
    engine = instantiate(OmegaConf.load(folder / "transformers.yaml"))
    assert isinstance(engine, TransformersEngine)
    assert isinstance(engine, Engine)
