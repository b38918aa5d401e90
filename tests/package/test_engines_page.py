"""docs/engines.md holds: its commands compose, its parts build, its settings exist, its links lead somewhere."""

from __future__ import annotations

import re

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from opd_lightning import serve_teacher
from opd_lightning.building import KEYS, objective_from
from opd_lightning.commands import build, refuse_unknown_keys
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
    monkeypatch.setattr("opd_lightning.engine.vllm.check_installed", lambda: None)
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


def test_the_vllm_server_has_the_flags_of_the_yaml():
    (server,) = of("vllm.entrypoints.openai.api_server")
    wanted = (CONF_DIR / "engine" / "vllm_server.yaml").read_text().split("On a CPU")[0]
    flags = set(re.findall(r"--[\w-]+", wanted))
    assert flags <= set(server.words)
    assert dict(server.variables)["VLLM_SERVER_DEV_MODE"] == "1"
    folder = server.words[server.words.index("--model") + 1]
    runs = [c for c in of("opd_lightning.train") if "engine=vllm_server" in c.words]
    assert len(runs) == 2
    assert all(f"engine.folder={folder}" in c.words for c in runs)


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
