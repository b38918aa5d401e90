"""What every part must keep, read off its yaml: a new file is tested the moment it exists."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate

from opd_lightning import protocols
from opd_lightning.paths import CONF_DIR
from opd_lightning.types import Needs, Want

PROTOCOLS = {
    "divergence": protocols.Divergence,
    "reward": protocols.Reward,
    "estimator": protocols.Estimator,
    "support": protocols.Support,
    "mask": protocols.Mask,
    "regularizer": protocols.Regularizer,
    "reduction": protocols.Reduction,
}
LISTED = {"mask", "regularizer"}
DECLARING = {"estimator", "support", "mask", "regularizer"}
LINES = {
    "estimator": 100,
    "regularizer": 130,
}  # the trust region has three treatments of outliers; elsewhere 80
FILES = sorted(f for group in PROTOCOLS for f in (CONF_DIR / group).glob("*.yaml"))
every = pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A configuration with these groups alone."""
    folder = tmp_path_factory.mktemp("conf")
    defaults = [
        "_self_",
        {"support": "none"},
        {"estimator": "topk"},
        {"mask": []},
        {"regularizer": []},
        {"reduction": "token_mean"},
    ]
    search = {"searchpath": [f"file://{CONF_DIR}"]}
    (folder / "train.yaml").write_text(yaml.safe_dump({"defaults": defaults, "hydra": search}))
    return folder


@pytest.fixture
def composed(root):
    """Compose and instantiate with overrides, as a command does."""
    with initialize_config_dir(str(root), version_base="1.3"):
        yield lambda *overrides: instantiate(compose("train", list(overrides)), _convert_="all")


def part_of(file: Path, composed):
    group, name = file.parent.name, file.stem
    if group in LISTED:
        return composed(f"{group}=[{name}]")[group][name]
    estimator = ["estimator=token"] if group == "reward" else []
    return composed(*estimator, f"{group}={name}")[group]


def settings(file: Path) -> dict:
    content = yaml.safe_load(file.read_text())
    return content[file.stem] if file.parent.name in LISTED else content


def module_of(file: Path) -> str:
    return settings(file)["_target_"].rpartition(".")[0]


@every
def test_is_a_frozen_dataclass_behind_its_protocol(file, composed):
    part = part_of(file, composed)
    kind = type(part)
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert isinstance(part, PROTOCOLS[file.parent.name])
    assert part == part_of(file, composed)
    hash(part)
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.anything = 1


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name in DECLARING], ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_declares_its_needs(file, composed):
    part = part_of(file, composed)
    assert isinstance(part.needs, Needs)
    if file.parent.name in {"estimator", "regularizer"}:
        assert isinstance(part.want, Want)
    if file.parent.name == "support":
        assert part.size is None or part.size >= 1


@every
def test_lives_where_its_yaml_says(file):
    """In the module of its name, or in one that holds a family: top_reverse_kl in top."""
    group, _, name = module_of(file).removeprefix("opd_lightning.").rpartition(".")
    assert group == file.parent.name
    assert file.stem == name or file.stem.startswith(f"{name}_")


@every
def test_every_setting_is_a_field_with_a_comment(file):
    values = settings(file)
    module, _, name = values.pop("_target_").rpartition(".")
    values.pop("defaults", None)
    fields = {f.name: f for f in dataclasses.fields(getattr(importlib.import_module(module), name))}
    assert set(values) <= set(fields)
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    assert required <= set(values)
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    for key in values:
        line = next(text for text in lines if text.strip().startswith(f"{key}:"))
        assert " # " in line, f"{key} has no comment"


@every
def test_module_is_small_and_keeps_to_itself(file):
    """No Lightning, no Hydra, no sibling group; a screen or two."""
    group = file.parent.name
    source = Path(importlib.import_module(module_of(file)).__file__).read_text()
    assert len(source.splitlines()) < LINES.get(group, 80)
    nodes = list(ast.walk(ast.parse(source)))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    siblings = {"engine", "rollout", "teacher", "task", *PROTOCOLS} - {group}
    for imported in names:
        top, *rest = imported.split(".")
        assert top not in {"lightning", "hydra", "omegaconf"}
        assert top != "opd_lightning" or rest[0] not in siblings


def test_every_part_has_a_yaml():
    for group in PROTOCOLS:
        modules = Path(importlib.import_module(f"opd_lightning.{group}").__file__).parent.glob("[!_]*.py")
        assert {m.stem for m in modules} == {
            module_of(f).rpartition(".")[2] for f in FILES if f.parent.name == group
        }


def test_divergence_belongs_to_topk(composed):
    assert type(composed("divergence=jsd")["estimator"].divergence).__name__ == "JSD"
    parts = composed("estimator=topk", "divergence=skewed", "divergence.alpha=0.4")
    assert parts["estimator"].divergence.alpha == 0.4
    with pytest.raises(ConfigCompositionException, match="Could not override 'divergence'"):
        composed("estimator=token", "divergence=jsd")


@pytest.mark.parametrize("estimator", ["token", "discounted", "sequence"])
def test_reward_belongs_to_the_score_functions(composed, estimator):
    part = composed(f"estimator={estimator}", "reward=floor", "reward.floor=-2")["estimator"]
    assert part.reward.floor == -2
    with pytest.raises(ConfigCompositionException, match="Could not override 'reward'"):
        composed("estimator=topk", "reward=floor")


def test_gamma_may_be_a_schedule_in_yaml(composed):
    gamma = "{_target_: opd_lightning.schedule.Linear, start: 0, end: 1}"
    part = composed("estimator=discounted", f"estimator.gamma={gamma}")["estimator"]
    assert part.gamma.value(0.5) == 0.5
