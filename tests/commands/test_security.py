"""Nothing of a checkpoint is run that was not asked for, and no secret of a user's is written down."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from commands.own import save_model
from commands.running import here
from commands.test_refusals import refusal

SMALL = ["debug=fast", "logger=[csv]", "callbacks=[]", "evaluation.teacher=false"]
CODE = """
from pathlib import Path
from transformers import Qwen3Config, Qwen3ForCausalLM

Path(__file__).with_name("ran").touch()

class OwnConfig(Qwen3Config):
    model_type = "own"

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def with_code(folder):
    """A model whose configuration and weights are read by code that lies beside them."""
    save_model(folder)
    marker = folder.parent / "ran"
    (folder / "own.py").write_text(CODE.replace('Path(__file__).with_name("ran")', f"Path({str(marker)!r})"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_code_of_a_checkpoint_is_not_run(role, tmp_path):
    model, marker = with_code(tmp_path / "model")
    done = here("train", *SMALL, f"{role}.path={model}", folder=tmp_path / "run")
    refusal(done, f"{role}.path", "without code of its own", f"{role}.trust_remote_code=true")
    assert not marker.exists()


def test_code_of_a_checkpoint_is_run_where_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, marker = with_code(tmp_path / "model")
    done = here(
        *("train", *SMALL, f"student.path={model}", "student.trust_remote_code=true"),
        *("teacher=self", "teacher.context=so", "trainer.max_steps=1"),
        folder=tmp_path / "run",
    )
    assert done.code == 0, done.err
    assert marker.exists()


def test_trust_in_the_student_is_none_in_the_teacher(tmp_path):
    model, marker = with_code(tmp_path / "model")
    done = here(
        "train", *SMALL, "student.trust_remote_code=true", f"teacher.path={model}", folder=tmp_path / "run"
    )
    refusal(done, "teacher.path", "teacher.trust_remote_code=true")
    assert not marker.exists()


def test_trust_is_a_switch(tmp_path):
    done = here("train", "student.trust_remote_code=maybe", folder=tmp_path / "run")
    refusal(done, "student.trust_remote_code", "true or false", "got 'maybe'")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_pickle_is_not_read(command, tmp_path):
    """Its reading would run what it holds."""
    model = save_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    done = here(command, f"student.path={model}", folder=tmp_path / "run")
    refusal(done, "student.path", "safetensors", "pytorch_model.bin alone", "save_pretrained")
