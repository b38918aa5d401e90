"""The configuration as a whole: every yaml composes, every preset trains, and what a user writes wins."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import re
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from commands.running import here
from opd_lightning.assemble import CollectorSettings
from opd_lightning.building import KEYS, objective_from
from opd_lightning.commands import build, plain, refuse_unknown_keys
from opd_lightning.errors import ConfigError
from opd_lightning.paths import CONF_DIR

ROOT = yaml.safe_load((CONF_DIR / "train.yaml").read_text())
CHOSEN = {
    name: option for entry in ROOT["defaults"] if isinstance(entry, dict) for name, option in entry.items()
}
FILES = sorted((f.parent.name, f.stem) for f in CONF_DIR.glob("*/*.yaml"))
WHOLE = {"experiment", "debug", "scale"}
"""Groups whose options change others; an option of any other is a part, or one of a list of parts."""
LISTED = {group for group, option in CHOSEN.items() if isinstance(option, list)}
OWNED = {"divergence": "topk", "reward": "token"}
"""Groups that come with an estimator."""
PRESETS = [option for group, option in FILES if group == "experiment"]
SCALES = [option for group, option in FILES if group == "scale"]


def options(group: str) -> list[str]:
    return [option for name, option in FILES if name == group]


def named(group: str, option: str) -> Any:
    return pytest.param(group, option, id=f"{group}={option}")


def content(group: str, option: str) -> dict[str, Any]:
    """Return a yaml's own values."""
    loaded = OmegaConf.to_container(OmegaConf.load(CONF_DIR / group / f"{option}.yaml"), resolve=False)
    return {name: value for name, value in loaded.items() if name != "defaults"}


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each plain value under its dotted key."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def at(config: DictConfig, key: str) -> Any:
    """Return the value at a dotted key, an interpolation or a gap as it is written."""
    above, _, last = key.rpartition(".")
    node = OmegaConf.to_container(OmegaConf.select(config, above), resolve=False)
    return node[last]


def composed(*overrides: str, folder: Path = CONF_DIR) -> DictConfig:
    """Compose the command's configuration with overrides."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose("train", list(overrides))


# -- every option


def is_default(group: str, option: str) -> bool:
    chosen = CHOSEN.get(group, "log_ratio" if group == "reward" else "reverse_kl")
    return option in chosen if isinstance(chosen, list) else option == chosen


def check_part(config: DictConfig, group: str, option: str) -> None:
    """The values of a yaml have arrived, and its class takes them."""
    written = dict(flat(content(group, option), f"{group}."))
    assert {key: at(config, key) for key in written} == written
    if group == "collector":
        CollectorSettings(**plain(config.collector))
    elif group == "evaluation":
        build(config.evaluation.settings)
    elif group in LISTED - {"callbacks", "logger"}:  # those two want a run's folder
        build(config[group][option])
    elif "_target_" in config[group] and group not in ("trainer", "strategy"):
        missing = (group, option) == ("engine", "vllm") and find_spec("vllm") is None
        with pytest.raises(ConfigError, match="pip install") if missing else contextlib.nullcontext():
            build(config[group])


def test_the_defaults():
    config = composed()
    refuse_unknown_keys(config, KEYS)
    for group, option in FILES:
        if is_default(group, option) and group in config:
            check_part(config, group, option)


@pytest.mark.parametrize(
    ("group", "option"), [named(*f) for f in FILES if f[0] not in WHOLE and not is_default(*f)]
)
def test_every_other_option(group, option):
    overrides = [f"{group}=[{option}]" if group in LISTED else f"{group}={option}"]
    overrides += [f"estimator={OWNED[group]}"] if group in OWNED else []
    overrides += ["task.path=a.jsonl"] if option == "jsonl" else []
    overrides += ["teacher.path=here"] if (group, option) == ("teacher", "vllm_server") else []
    config = composed(*overrides)
    refuse_unknown_keys(config, KEYS)
    if option == "jsonl":  # its class wants the file to be there
        assert config.task == content(group, option) | {"path": "a.jsonl"}
    elif overrides[-1] == "teacher.path=here":
        assert config.teacher == content(group, option) | {"path": "here"}
        build(config.teacher)
    else:
        check_part(config, group, option)


@pytest.mark.parametrize("group", sorted(LISTED))
def test_a_list_keeps_all_in_its_order(group):
    """Each in a key of its own name, in the order that was asked for."""
    for option in options(group):
        assert set(content(group, option)) == {option}
    for names in (options(group), options(group)[::-1]):
        assert list(composed(f"{group}=[{','.join(names)}]")[group]) == names


# -- who wins


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_wins_over_its_groups_and_the_command_line_over_both(preset):
    values = dict(flat(content("experiment", preset)))
    config = composed(f"experiment={preset}")
    refuse_unknown_keys(config, KEYS)
    assert {key: at(config, key) for key in values} == values
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    others = {key: value + 1 for key, value in numbers.items()}
    config = composed(f"experiment={preset}", *(f"{key}={value}" for key, value in others.items()))
    assert {key: at(config, key) for key in others} == others


@pytest.mark.parametrize("preset", PRESETS)
def test_debug_wins_over_a_preset(preset):
    values = dict(flat(content("debug", "fast")))
    config = composed("debug=fast", f"experiment={preset}")
    assert {key: at(config, key) for key in values} == values


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_the_method_alone(preset):
    """So that it runs on any models, task and machine."""
    method = {"estimator", "support", "divergence", "reward", "rollout", "mask", "regularizer", "reduction"}
    method |= {"teacher", "reference"}  # who they are, and not where they lie
    assert set(content("experiment", preset)) <= method | {"collector"}
    assert not {key for key, _ in flat(content("experiment", preset)) if key.endswith((".path", ".lr"))}
    loaded = yaml.safe_load((CONF_DIR / "experiment" / f"{preset}.yaml").read_text())
    groups = {
        name.removeprefix("override /").partition("@")[0] for entry in loaded["defaults"] for name in entry
    }
    assert groups <= method


@pytest.mark.parametrize("group", ["experiment", "scale"])
def test_every_value_of_a_preset_says_where_it_comes_from(group):
    """A place on a page of methods, or "ours"; a value that is written once more says "the same"."""
    for option in options(group):
        _, _, body = (CONF_DIR / group / f"{option}.yaml").read_text().partition("defaults:")
        silent = [
            line
            for line in body.splitlines()
            if re.match(r"\s*\w+:\s+\S", line)
            and not re.search(r"#.*(section|part|ours|the same|rows with)", line)
        ]
        assert not silent, f"{group}/{option}"


# -- the papers' own scale


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_composes_with_its_preset(scale, tmp_path):
    """Models, data, batch, lengths and learning rate of the paper; the method stays the preset's."""
    config = composed(f"experiment={scale}", f"scale={scale}")
    refuse_unknown_keys(config, KEYS)
    values = {k: v for k, v in flat(content("scale", scale)) if "_target_" not in k}
    assert {key: at(config, key) for key in values} == values
    assert not {key.partition(".")[0] for key in values} & {"estimator", "support", "regularizer", "mask"}
    assert config.student.path != composed().student.path
    assert config.optimizer.lr < 1e-3
    method = composed(f"experiment={scale}")
    for group in ("estimator", "support", "regularizer", "mask", "reduction"):
        assert config.get(group) == method.get(group)
    # Everything that needs no model or file is built from it.
    objective_from(config)
    build(config.rollout)
    CollectorSettings(**plain(config.collector))
    build(config.evaluation.settings)
    build(config.optimizer)([torch.nn.Parameter(torch.zeros(1))])


# -- the four papers' presets train; tests/package/test_readme.py trains all, in one command


@pytest.mark.parametrize("preset", ["esr", "local_support_matching", "tropd", "stable_opd"])
def test_a_preset_trains_two_steps(preset, tmp_path):
    small = ["evaluation.settings.problems=1", "evaluation.teacher=false", "callbacks=[]", "logger=[csv]"]
    done = here("train", f"experiment={preset}", "debug=fast", *small, folder=tmp_path / "run")
    assert done.summary["optimizer_steps"] == 2
    assert len(done.losses) == 2
    assert all(map(math.isfinite, done.losses))
    assert len(set(done.losses)) == 2


# -- parts together


@pytest.fixture(scope="module")
def objective(tmp_path_factory):
    """Compose the groups of an objective alone, for their number of combinations."""
    folder = tmp_path_factory.mktemp("objective")
    groups = ("support", "estimator", "regularizer", "mask", "reduction")
    root = {"defaults": ["_self_", *({name: CHOSEN[name]} for name in groups)]}
    (folder / "train.yaml").write_text(
        yaml.safe_dump(root | {"hydra": {"searchpath": [f"file://{CONF_DIR}"]}})
    )
    return partial(composed, folder=folder)


@pytest.mark.parametrize("support", options("support"))
@pytest.mark.parametrize("estimator", options("estimator"))
def test_an_estimator_with_a_support(estimator, support, objective):
    """Each pair is built, or refused with the remedy for the reason that there is."""
    if estimator == "topk":
        return check_topk(support, objective)
    config = objective(f"estimator={estimator}", f"support={support}")
    needs = build(config.estimator).needs
    if needs.support and support == "none":
        with pytest.raises(ConfigError, match=r"^`support` must .*, got none; .*support="):
            objective_from(config)
    else:
        assert objective_from(config).uses_support == needs.support
    return None


def check_topk(support, objective):
    for divergence in options("divergence"):
        config = objective("estimator=topk", f"support={support}", f"divergence={divergence}")
        config.estimator.biased = True
        for config.estimator.form in ("renormalised", "tail", "plain"):
            if support == "none" or (support == "sampled" and config.estimator.form == "renormalised"):
                sentence = r"^`support` must .*, got (none|1: .*); .*(support=|support\.k=)"
                with pytest.raises(ConfigError, match=sentence):
                    objective_from(config)
            else:
                built = objective_from(config)
                assert built.uses_support
                assert type(built.estimator.divergence).__module__.endswith(f".{divergence}")


# -- one place for a default


def targets(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every node of ours that names a class."""
    if isinstance(node, dict):
        if str(node.get("_target_", "")).startswith("opd_lightning."):
            yield node
        for value in node.values():
            yield from targets(value)


@pytest.mark.parametrize(("group", "option"), [named(*f) for f in FILES])
def test_a_default_has_not_drifted_apart(group, option):
    """A setting is written in the yaml; where the code has a default too, for Python users, it is the same one."""
    standard = is_default(group, option) or len(options(group)) == 1
    for node in targets(content(group, option)):
        module, _, name = node["_target_"].rpartition(".")
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        twice = {k: p.default for k, p in parameters.items() if k in node and p.default is not p.empty}
        if standard or group == "estimator":
            same = {key: list(value) if isinstance(value, tuple) else value for key, value in twice.items()}
            assert same == {key: node[key] for key in twice}
