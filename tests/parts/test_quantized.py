"""Teachers quantised on load: what can be, what it says, and the sentence where a package is missing."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from commands.own import save_model, shipped_tokenizer
from tiny import random_rollout, tiny_model
from transformers import BitsAndBytesConfig

from opd_lightning.errors import ConfigError
from opd_lightning.loading import Loading
from opd_lightning.scorer import Scorer
from opd_lightning.teacher.local import LocalTeacher
from opd_lightning.teacher.quantized import configured
from opd_lightning.types import Want

TOKENS = random_rollout(4).tokens
WIDTH = len(shipped_tokenizer())
TORCHAO = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao (the extra quantize)")


def missing(package: str, settings) -> object:
    """A case for a machine without the package."""
    here = find_spec(package) is not None
    return pytest.param(settings, package, marks=pytest.mark.skipif(here, reason=f"{package} is installed"))


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        missing("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        missing("bitsandbytes", {"load_in_4bit": True}),
        missing("bitsandbytes", BitsAndBytesConfig(load_in_8bit=True)),
        missing("optimum", {"quant_method": "quanto", "weights": "int8"}),
        missing("torchao", TORCHAO),
    ],
)
def test_a_missing_package_is_named_before_a_model_is_loaded(settings, package):
    with pytest.raises(ConfigError) as refusal:
        LocalTeacher(path="nowhere", dtype="float32", quantization=settings)
    said = str(refusal.value)
    assert said.startswith(
        "`teacher.quantization` must be a way of transformers to quantise that works here, got "
    )
    assert package in said.split("; ")[0]
    assert "pip install" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "nonsense"}, "Unknown quantization type"),
        ({"bits": 8}, "quant_method"),
        ("int8", "a dictionary with quant_method"),
    ],
)
def test_what_is_no_way_to_quantise_is_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        configured(settings)
    assert configured(None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_said():
    with pytest.raises(ConfigError, match="GPU or XPU"):
        configured({"quant_method": "fp8"})


def test_one_of_offload_and_quantization():
    with pytest.raises(ConfigError, match=r"`teacher\.offload` must be null with teacher\.quantization"):
        LocalTeacher(path="nowhere", dtype="float32", offload="cpu", quantization=TORCHAO)


# -- torchao, on a CPU too


def loading() -> Loading:
    return Loading(
        student=Scorer(tiny_model(3, vocab=448)),
        student_path="here",
        student_dtype="float32",
        tokenizer=shipped_tokenizer(),
        vocab=WIDTH,
        scratch_mb=1,
    )


@needs_torchao
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_weights_of_eight_bits_say_nearly_the_same(tmp_path, tied, kind):
    folder = str(save_model(tmp_path / "a", tie_word_embeddings=tied))
    settings = TORCHAO | {"quant_type": kind}
    made = LocalTeacher(path=folder, dtype="float32", quantization=settings)
    assert settings == TORCHAO | {"quant_type": kind}, "what the user wrote is in the run's config.yaml"
    teacher = made.load(loading()).to("cpu")
    layer = teacher.scorer.model.model.layers[0].mlp.up_proj.weight
    assert type(layer).__name__ == "Int8Tensor"
    assert type(teacher.scorer.head.weight) in (torch.Tensor, torch.nn.Parameter)
    whole = LocalTeacher(path=folder, dtype="float32").load(loading())
    want = Want(taken=True, hidden=True, top=4)
    found, wanted = teacher(TOKENS, want), whole(TOKENS, want)
    gap = (found.taken_logp - wanted.taken_logp).abs().max()
    assert 0 < gap < 0.3
    assert found.hidden.shape == wanted.hidden.shape
    assert found.top_logp.isfinite().all()


@needs_torchao
def test_a_cache_knows_quantised_weights_from_whole_ones(tmp_path):
    folder = str(save_model(tmp_path / "a"))
    digests = []
    for quantization in (None, TORCHAO, TORCHAO):
        made = LocalTeacher(
            path=folder, dtype="float32", quantization=quantization, cache=str(tmp_path / "cache")
        )
        digests.append(made.load(loading()).model)
    assert digests[0] != digests[1] == digests[2]


@needs_torchao
def test_settings_of_the_kind_stand_beside_it():
    kind = {"quant_type": "Int4WeightOnlyConfig", "group_size": 32, "modules_to_not_convert": ["a"]}
    config = configured(TORCHAO | kind)
    assert config.quant_type.group_size == 32
    assert config.modules_to_not_convert == ["a"]
    with pytest.raises(ConfigError, match="NoSuchConfig"):
        configured(TORCHAO | {"quant_type": "NoSuchConfig"})


@needs_torchao
def test_a_quantised_head_is_refused(tmp_path):
    folder = str(save_model(tmp_path / "a", tie_word_embeddings=False))
    made = LocalTeacher(
        path=folder, dtype="float32", quantization=TORCHAO | {"include_input_output_embeddings": True}
    )
    with pytest.raises(ConfigError, match=r"`teacher\.quantization` must leave the head's weight as it is"):
        made.load(loading())
