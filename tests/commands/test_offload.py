"""``teacher.offload`` and ``teacher.quantization`` on a command line."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from commands.running import here

SMALL = [
    "debug=fast",
    "rollout.max_new_tokens=8",
    "evaluation.settings.max_new_tokens=8",
    "logger=[csv]",
    "callbacks=[]",
]
KIND = "{quant_method: torchao, quant_type: Int8WeightOnlyConfig}"
TARGET = "{_target_: transformers.TorchAoConfig, quant_type: {_target_: torchao.quantization.Int8WeightOnlyConfig}}"
torchao = find_spec("torchao") is not None


def test_a_teacher_that_rests_gives_the_same_losses(tmp_path):
    """Over the whole vocabulary, whose head stays; and the teacher answers the held-out problems too."""
    words = [
        *SMALL,
        "support=full",
        "rollout=teacher_prefix",
        "rollout.fraction=0.1",
        "rollout.max_new_tokens=20",
    ]
    done = [
        here("train", *words, *more, folder=tmp_path / f"{n}")
        for n, more in enumerate(([], ["teacher.offload=cpu"]))
    ]
    one, other = done
    assert other.losses == one.losses
    assert len(set(one.losses)) == 2
    assert other.summary["teacher_accuracy"] == one.summary["teacher_accuracy"] is not None


@pytest.mark.usefixtures("models_stay_closed")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["teacher.offload=disk"], "`teacher.offload` must be cpu or null"),
        (["teacher.offload=cpu", f"teacher.quantization={KIND}"], "`teacher.offload` must be null with"),
        (["teacher.quantization={quant_method: nonsense}"], "`teacher.quantization` must be a way of transformers"),
        pytest.param(
            [f"teacher.quantization={KIND}"],
            "No module named 'torchao'); correct it, or install what it needs (torchao: pip install",
            marks=pytest.mark.skipif(torchao, reason="torchao is installed"),
        ),
    ],
)  # fmt: skip
def test_refusals_before_a_model_is_opened(tmp_path, words, sentence):
    assert sentence in here("train", *words, folder=tmp_path / "run").sentence


@pytest.mark.usefixtures("models_stay_closed")
def test_a_server_does_not_rest(tmp_path):
    said = here("serve_teacher", "teacher.offload=cpu", folder=tmp_path / "run").sentence
    assert "`teacher.offload` must be null in a server" in said


@pytest.mark.skipif(not torchao, reason="needs torchao (the extra quantize)")
@pytest.mark.parametrize("quantization", [KIND, TARGET], ids=["dictionary", "target"])
def test_trains_from_a_quantised_teacher(tmp_path, quantization):
    done = here("train", *SMALL, f"teacher.quantization={quantization}", folder=tmp_path / "run")
    plain = here("train", *SMALL, folder=tmp_path / "plain")
    assert done.losses != plain.losses
    assert done.losses == pytest.approx(plain.losses, rel=0.2)
