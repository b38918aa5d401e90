"""docs/methods.md holds: a row for each preset, commands that compose, links that lead somewhere."""

from __future__ import annotations

import re

import pytest
from hydra import compose, initialize_config_dir

from opd_lightning import toy_gamma
from opd_lightning.building import KEYS, objective_from
from opd_lightning.commands import build, refuse_unknown_keys
from opd_lightning.paths import CONF_DIR
from package.readme import ROOT, command, links

PAGE = ROOT / "docs" / "methods.md"
TEXT = PAGE.read_text()
PRESETS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
HEAD = ["method, paper", "command", "what it changes", "ours", "measured here"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows(text: str = TEXT) -> list[list[str]]:
    """Return the rows of the tables of presets: those under their head."""
    found, inside = [], False
    for line in text.splitlines():
        inside = line.startswith("|") and (inside or cells(line) == HEAD)
        if inside and cells(line) != HEAD and set(line) - set("|- "):
            found.append(cells(line))
    return found


def overrides(row: list[str]) -> list[str]:
    """Return the overrides of a row's command."""
    (shown,) = re.findall(r"`([^`]+)`", row[1])
    parsed = command(shown)
    assert parsed.module == "opd_lightning.train", row[1]
    return list(parsed.words[3:])


def preset(row: list[str]) -> str:
    (name,) = (word.removeprefix("experiment=") for word in overrides(row) if word.startswith("experiment="))
    return name


def composed(entry: str, words: list[str]):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(entry, words)


def shown(module: str) -> list[list[str]]:
    """Return the overrides of a module's commands in the page's shell blocks."""
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.M | re.S)
        for line in block.splitlines()
    ]
    parsed = [command(line) for line in lines]
    return [list(c.words[3:]) for c in parsed if c.module == f"opd_lightning.{module}"]


def test_each_preset_has_one_row_and_each_row_a_preset():
    assert sorted(map(preset, rows())) == PRESETS


@pytest.mark.parametrize("row", rows(), ids=preset)
def test_a_row_is_whole_and_its_command_composes(row):
    assert len(row) == len(HEAD)
    assert all(row)
    config = composed("train", overrides(row))
    refuse_unknown_keys(config, KEYS)
    assert objective_from(config)
    assert build(config.rollout)


def test_a_row_names_its_paper_as_the_preset_does():
    """By its arXiv id, where the preset's first lines have one."""
    for row in rows():
        head = (CONF_DIR / "experiment" / f"{preset(row)}.yaml").read_text().split("defaults:")[0]
        ids = re.findall(r"arXiv (\d{4}\.\d{5})", head)
        assert re.findall(r"arXiv (\d{4}\.\d{5})", row[0]) == ids, preset(row)


def test_the_page_s_other_commands_compose():
    train = [words for words in shown("train") if "-m" not in words]
    assert train
    for words in train:
        refuse_unknown_keys(composed("train", words), KEYS)
    toys = shown("toy_gamma")
    assert toys
    for words in toys:
        assert toy_gamma.settings_of(composed("toy_gamma", [*words, "pictures=false"]))


def test_every_link_leads_somewhere():
    targets = links(TEXT)
    assert targets
    for target in targets:
        assert (PAGE.parent / target).exists(), target


def test_every_anchor_is_a_heading():
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }
    anchors = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert anchors
    assert set(anchors) <= headings
