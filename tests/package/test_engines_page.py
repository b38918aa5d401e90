"""docs/engines.md holds: its commands compose, its parts build, its settings exist, its links lead somewhere."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from opd_lightning import serve_teacher
from opd_lightning.building import KEYS, objective_from
from opd_lightning.commands import build, refuse_unknown_keys
from opd_lightning.engine.vllm_transfer import BACKENDS
from opd_lightning.errors import ConfigError
from opd_lightning.paths import CONF_DIR
from package.readme import ROOT, Command, blocks, command, links

PAGE = ROOT / "docs" / "engines.md"
TEXT = PAGE.read_text()
OTHERS = {"ssh", "export"}
"""First words of lines that are not Python's."""


def shown() -> list[Command]:
    """Return the page's shell commands."""
    found = [block.text.replace("\\\n", " ") for block in blocks(TEXT) if block.language == "bash"]
    parsed = [
        command(line.removesuffix(" &")) for text in found for line in text.splitlines() if line.strip()
    ]
    return [c for c in parsed if c.words[0] not in OTHERS]


def of(module: str) -> list[Command]:
    return [c for c in shown() if c.module == module]


def composed(entry: str, words: list[str]):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(entry, words)


def test_every_command_is_one_of_three():
    modules = {c.module for c in shown()}
    server = "vllm.entrypoints.openai.api_server"
    assert modules == {"opd_lightning.train", "opd_lightning.serve_teacher", server}


@pytest.mark.parametrize("shown", of("opd_lightning.train"), ids=lambda c: " ".join(c.words[3:])[:80])
def test_a_run_composes_and_its_parts_are_built(shown, monkeypatch):
    for engine in ("vllm", "vllm_transfer"):
        monkeypatch.setattr(f"opd_lightning.engine.{engine}.check_installed", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = composed("train", list(shown.words[3:]))
    refuse_unknown_keys(config, KEYS)
    assert objective_from(config)
    for part in ("engine", "rollout", "teacher", "task"):
        assert build(config[part])
    per_step = config.collector.prompts_per_collection // config.collector.steps_per_collection
    visible = dict(shown.variables).get("CUDA_VISIBLE_DEVICES", "0").split(",")
    assert per_step % len(visible) == 0


@pytest.mark.parametrize("shown", of("opd_lightning.serve_teacher"), ids=lambda c: " ".join(c.words[3:])[:80])
def test_a_server_composes_and_accepts_its_settings(shown, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("OPD_TEACHER_TOKEN", raising=False)
    config = composed("serve_teacher", list(shown.words[3:]))
    if config.host != "127.0.0.1":
        with pytest.raises(ConfigError, match="without a token"):
            serve_teacher.check(config)
        monkeypatch.setenv("OPD_TEACHER_TOKEN", "abc")
    serve_teacher.check(config)
    assert build(config.teacher)


def test_each_vllm_server_has_the_flags_of_the_yaml_and_a_run_that_goes_with_it():
    wanted = (CONF_DIR / "engine" / "vllm_server.yaml").read_text().split("On a CPU")[0]
    flags = set(re.findall(r"--[\w-]+", wanted))
    taken = []
    for server in of("vllm.entrypoints.openai.api_server"):
        words = server.words
        assert flags <= set(words)
        assert dict(server.variables)["VLLM_SERVER_DEV_MODE"] == "1"
        after = dict(pairwise(words))
        config = json.loads(after.get("--weight-transfer-config", '{"backend": "folder"}'))
        model = "engine.folder" if config["backend"] == "folder" else "student.path"
        taken.append((config["backend"], f"{model}={after['--model']}"))
        insecure = "VLLM_ALLOW_INSECURE_SERIALIZATION" in dict(server.variables)
        assert insecure == (config["backend"] == "ipc")
    assert [kind for kind, _ in taken] == ["folder", "nccl", "ipc", "nccl"]
    runs = [c.words for c in of("opd_lightning.train") if "engine=vllm_server" in c.words]
    assert len(runs) == 5
    for words in runs:
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        kind = settings.get("engine.transfer", "folder")
        assert any(kind == theirs and model in words for theirs, model in taken)
        assert (settings["engine.folder"] == "null") == (kind != "folder")


def test_each_transfer_is_in_the_table_with_its_backend():
    for kind, backend in BACKENDS.items():
        (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{kind}`")]
        assert f"""--weight-transfer-config '{{"backend": "{backend}"}}'""" in row


def test_every_engine_and_every_setting_that_is_named_exists():
    for path in (CONF_DIR / "engine").glob("*.yaml"):
        assert f"`engine={path.stem}`" in TEXT
    for group in ("engine", "teacher"):
        files = [OmegaConf.load(path) for path in (CONF_DIR / group).glob("*.yaml")]
        there = set().union(*files)
        named = set(re.findall(rf"`{group}\.(\w+)", TEXT))
        assert named
        assert named <= there
        options = set(re.findall(rf"`{group}=(\w+)`", TEXT))
        assert options <= {path.stem for path in (CONF_DIR / group).glob("*.yaml")}
    for option in set(re.findall(r"`rollout=(\w+)`", TEXT)):
        assert (CONF_DIR / "rollout" / f"{option}.yaml").exists()
    for option in set(re.findall(r"`support=(\w+)`", TEXT)):
        assert (CONF_DIR / "support" / f"{option}.yaml").exists()


def test_the_measured_speeds_are_those_of_the_results():
    results = (ROOT / "benchmarks" / "results" / "2026-11-22_engines.md").read_text()
    table = TEXT.split("| student | `transformers`")[1].split("\n\n")[0]
    numbers = re.findall(r"\| ([\d,]+)(?= \|)", table)
    assert len(numbers) == 5
    assert all(f"| {number} |" in results for number in numbers)


def test_every_link_leads_somewhere():
    assert links(TEXT)
    for target in links(TEXT):
        assert (PAGE.parent / target).resolve().exists(), target
