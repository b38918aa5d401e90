"""Low-rank adapters: they start at nothing, they alone are trained, and what is saved is a plain model."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_rollout, tiny_model
from transformers import AutoModelForCausalLM

from commands.own import FAMILIES, SUMS, save_model, write_rows
from commands.running import Finished, here
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.lora import Lora, adapted, merged
from opd_lightning.scorer import Scorer
from opd_lightning.types import Sampling, Want

ROLLOUT = random_rollout(6)
WANT = Want(taken=True, entropy=True, top=4)


def lora(**more) -> Lora:
    return Lora(**{"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"} | more)


def with_adapters(seed: int = 0, *, filled: bool = True, tied: bool = True, **more):
    """Return a tiny model with adapters, those of B drawn too."""
    model = tiny_model(seed, tied=tied).eval()
    lora(**more).add_to(model, 0)
    if filled:
        fill(model)
    return model


def fill(model) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def taken(model) -> torch.Tensor:
    with torch.no_grad():
        return Scorer(model)(ROLLOUT.tokens, WANT).taken_logp


def greedy(model, method: str = "auto") -> list[list[int]]:
    prompts = ROLLOUT.prompt
    sampling = Sampling(max_new_tokens=8, temperature=0.0, stop_ids=())
    return TransformersEngine(method=method).generate(model, prompts, sampling).ids.tolist()


# -- the layer


def test_at_first_they_change_nothing():
    assert torch.equal(taken(with_adapters(filled=False)), taken(tiny_model().eval()))
    assert not torch.allclose(taken(with_adapters()), taken(tiny_model().eval()), atol=1e-2)


def test_they_alone_are_trained():
    model = with_adapters()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # layers, products, A and B
    assert all("lora_" in name for name in trained)


def test_their_start_is_the_seeds_alone():
    draws = []
    for before, seed in ((0, 0), (1, 0), (0, 1)):
        model = tiny_model()
        torch.manual_seed(before)
        state = torch.random.get_rng_state()
        lora().add_to(model, seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        draws.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_they_are_trained_in_float32_on_a_student_in_half_precision():
    model = tiny_model().to(torch.bfloat16)
    lora().add_to(model, 0)
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert Scorer(model)(ROLLOUT.tokens, WANT).taken_logp.isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_the_same_model(tied):
    model = with_adapters(tied=tied)
    plain = tiny_model(9, tied=tied).eval()
    plain.load_state_dict(merged(model, model.state_dict()))
    torch.testing.assert_close(taken(plain), taken(model), rtol=1e-5, atol=1e-5)


# -- generation


def test_the_engine_generates_with_them():
    model = with_adapters()
    written = greedy(model)
    assert written == greedy(model, "generate")
    assert written != greedy(tiny_model().eval())
    prompts = ROLLOUT.prompt
    for row, ids in enumerate(written):
        prompt = prompts.ids[row][prompts.mask[row]][None]
        direct = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        assert direct[0, prompt.shape[1] :].tolist() == ids


def test_the_engine_sees_adapters_that_begin_at_the_second_layer():
    """The first comparison with the model's own forward, while they are zero, must not vouch for later."""
    model = with_adapters(filled=False, target_modules=r".*layers\.1\..*_proj")
    assert greedy(model) == greedy(tiny_model().eval())
    fill(model)
    assert greedy(model) == greedy(model, "generate") != greedy(tiny_model().eval())


def test_the_fast_decoder_refuses_them():
    with pytest.raises(ConfigError, match=r"`engine.method` must be auto or generate"):
        greedy(with_adapters(), "loop")


# -- refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", 1.5),
        ("alpha", 0),
        ("alpha", float("nan")),
        ("dropout", 1.0),
        ("target_modules", []),
    ],
)
def test_refuses_numbers(field, value):
    with pytest.raises(ConfigError, match=f"`student.lora.{field}` must"):
        lora(**{field: value})


@pytest.mark.parametrize("named", [["no_such"], ["lm_head"], ["q_proj", "embed_tokens"]])
def test_refuses_modules(named):
    with pytest.raises(ConfigError, match=r"`student.lora.target_modules` must"):
        lora(target_modules=named).add_to(tiny_model(tied=False), 0)


def test_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"`student.lora` must be null without peft.*opd-lightning\[lora\]"):
        lora().add_to(tiny_model(), 0)


# -- through the command


def train(tmp_path, student, *more: str) -> Finished:
    rows = write_rows(tmp_path / "sums.jsonl", SUMS)
    files = [f"task.{name}={rows}" for name in ("path", "val_path")]
    budget = ["debug=fast", "rollout.max_new_tokens=6", "evaluation.settings.max_new_tokens=6"]
    given = [f"student.path={student}", f"teacher.path={save_model(tmp_path / 't', seed=1)}", *files, *budget]
    return here("train", "task=jsonl", *given, "optimizer.lr=0.01", *more, folder=tmp_path / "run")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(1, 30)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_trains_and_saves(family, tied, tmp_path):
    """A plain model, which is the base with the adapters that are saved beside it; the base is as it was."""
    from peft import PeftModel

    base = save_model(tmp_path / "student", family, tie_word_embeddings=tied)
    done = train(tmp_path, base, "student/lora=default", "student.lora.rank=4")
    assert done.summary["optimizer_steps"] == 2
    assert all(loss > 0 for loss in done.losses)
    saved = AutoModelForCausalLM.from_pretrained(done.folder / "student")
    assert type(saved) is FAMILIES[family][1]
    assert not adapted(saved)
    shapes = {n: t.shape for n, t in load_file(base / "model.safetensors").items()}
    assert {n: t.shape for n, t in load_file(done.folder / "student/model.safetensors").items()} == shapes
    start = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(saved), logits(start), atol=1e-3)

    (path,) = done.folder.glob("checkpoints/step=*.ckpt")
    state = torch.load(path, weights_only=False)["state_dict"]
    before = start.state_dict()
    held = {n.removeprefix("student.model.").replace("base_layer.", ""): t for n, t in state.items()}
    assert all(torch.equal(held[name], tensor) for name, tensor in before.items())
    again = PeftModel.from_pretrained(start, done.folder / "student" / "adapter")
    torch.testing.assert_close(logits(again), logits(saved), rtol=1e-4, atol=1e-4)


def test_a_saved_student_is_evaluated_and_distilled_again(tmp_path):
    first = train(tmp_path, save_model(tmp_path / "student"), "student/lora=default")
    rows = tmp_path / "sums.jsonl"
    graded = here(
        "evaluate",
        "task=jsonl",
        f"task.val_path={rows}",
        f"student.path={first.folder / 'student'}",
        "max_new_tokens=4",
        folder=tmp_path / "graded",
    )
    assert graded.summary["problems"] == len(SUMS)


@pytest.mark.parametrize(
    ("says", "more"),
    [
        ("`student.lora.rank` must be", ["student/lora=default", "student.lora.rank=0"]),
        ("`student.lora` must be null or an option", ["student.lora={rank:8}"]),
        ("`student.lora` must hold what", ["student/lora=default", "+student.lora.bias=all"]),
    ],
)
def test_refuses_settings(says, more, tmp_path):
    assert says in train(tmp_path, save_model(tmp_path / "student"), *more).sentence


def test_evaluation_refuses_adapters(tmp_path):
    done = here("evaluate", "student/lora=default", folder=tmp_path / "run")
    assert "`student.lora` must be null" in done.sentence
