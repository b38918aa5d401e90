"""Nothing of a checkpoint is run that was not asked for, and no secret of a user's is written down."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from commands.own import save_model
from commands.running import here
from commands.test_refusals import refusal
from opd_lightning.commands import folder_name
from opd_lightning.redaction import redacted

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


# -- secrets

HUSH = "hush-hush-hush"


def test_no_secret_is_in_a_file_or_a_line_of_a_run(tmp_path, monkeypatch):
    """It stands in a setting, that of a folder, and in the environment: config.yaml and hparams.yaml hide it."""
    monkeypatch.setenv("OPD_TEACHER_TOKEN", HUSH)
    quick = [
        "debug=fast",
        "trainer.max_steps=1",
        "collector.prompts_per_collection=2",
        "evaluation.teacher=false",
    ]
    done = here("train", *quick, f"teacher.cache={tmp_path / HUSH}", folder=tmp_path / "run")
    assert done.code == 0, done.err
    assert (tmp_path / HUSH).is_dir()
    files = {path.name: path.read_bytes() for path in done.folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "hparams.yaml", "summary.json", "metrics.csv"} <= files.keys()
    assert not [name for name, content in files.items() if HUSH.encode() in content]
    assert HUSH not in done.out + done.err
    assert f"cache: {tmp_path}/***" in files["config.yaml"].decode()
    assert "***" in files["summary.json"].decode()


def test_an_address_with_a_password_is_refused_without_it(tmp_path):
    served = ["teacher=served", "teacher.address=http://me:letmein@host:1"]
    sentence = refusal(
        here("train", *served, folder=tmp_path / "run"), "teacher.address", "http://***@host:1"
    )
    assert "letmein" not in sentence
    engine = ["engine=vllm_server", "engine.url=http://me:letmein@host:1"]
    sentence = refusal(here("train", *engine, folder=tmp_path / "run"), "engine.url", "http://***@host:1")
    assert "letmein" not in sentence


def test_a_grid_s_folder_is_named_without_secrets():
    assert folder_name(3, "+logger.api_key=abc123,seed=1") == "+logger.api_key=***,seed=1"


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"token": "a", "n": 1}, {"token": "***", "n": 1}),
        ({"wandb": {"api_key": "a", "apikey": "b"}}, {"wandb": {"api_key": "***", "apikey": "***"}}),
        ({"password": None}, {"password": None}),
        ({"url": "https://me:pw@host/x?y=1"}, {"url": "https://***@host/x?y=1"}),
        (["logger.token=abc", "seed=1"], ["logger.token=***", "seed=1"]),
        ({"path": "hf_abcdefghijklmnopqrst"}, {"path": "***"}),
        (
            {"key_env": "OWN_VARIABLE", "x": "has own-value in it"},
            {"key_env": "OWN_VARIABLE", "x": "has *** in it"},
        ),
        # No secrets: tokens of text, and the names of variables.
        ({"tokens": ["a", "<eos>"]}, {"tokens": ["a", "<eos>"]}),
        ({"max_new_tokens": "8", "token_env": "HF_TOKEN"}, {"max_new_tokens": "8", "token_env": "HF_TOKEN"}),
        ({"mask": {"stop_token": {"_target_": "a.b"}}}, {"mask": {"stop_token": {"_target_": "a.b"}}}),
    ],
)
def test_redacted(settings, written, monkeypatch):
    monkeypatch.setenv("OWN_VARIABLE", "own-value")
    monkeypatch.setenv("MAX_TOKENS", "128000")
    assert redacted(settings) == written
    assert redacted("128000") == "128000"


def test_a_short_value_of_the_environment_hides_no_words(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "seed")
    assert redacted({"seed": "seed"}) == {"seed": "seed"}
