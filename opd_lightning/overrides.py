"""Overrides of a command line: what Hydra refuses, as one sentence with the remedy, and what a dictionary replaces."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from opd_lightning.errors import ConfigError
from opd_lightning.paths import CONF_DIR

_PACKAGED = re.compile(r"/(\w+)@_global_\.(\w+)")


@contextlib.contextmanager
def dictionaries_replace() -> Iterator[None]:
    """Have Hydra put ``key={_target_: ..., ...}`` in the place of what the key held, and any ``key={...}`` of nothing.

    Hydra merges the two, so that one schedule over another would keep the keys of both, and refuses to put the
    first names into an empty dictionary. It has no setting for this, and a command line rewritten as a deletion
    and an addition would be recorded as such.
    """
    name = "_apply_overrides_to_config"
    merge = getattr(ConfigLoaderImpl, name)

    def apply(overrides: list[Override], config: DictConfig) -> None:
        for override in overrides:  # in their order: a later one may set a key of the new dictionary
            if _replaces(override, config):
                OmegaConf.update(config, override.key_or_group, override.value(), merge=False)
            else:
                merge([override], config)

    setattr(ConfigLoaderImpl, name, staticmethod(apply))
    try:
        yield
    finally:
        setattr(ConfigLoaderImpl, name, staticmethod(merge))


def _replaces(override: Override, config: DictConfig) -> bool:
    """Return whether an override gives a class to a key that is there, or names to one that has none.

    Hydra says what is wrong with others.
    """
    holder, _, name = override.key_or_group.rpartition(".")
    if override.package is not None or not holder or override.is_delete() or override.is_add():
        return False
    value = override.value()
    node = OmegaConf.select(config, holder)
    if not (isinstance(value, dict) and isinstance(node, DictConfig) and name in node):
        return False
    held = node._get_node(name)
    return "_target_" in value or (isinstance(held, DictConfig) and len(held) == 0)


def explain(error: Exception, config_name: str, arguments: Sequence[str]) -> str | None:
    """Return one sentence for an error of Hydra's own, None for any other error.

    Args:
        error: what Hydra raised while it composed.
        config_name: of the command, for what could have been meant.
        arguments: of the command line.
    """
    text = str(error)
    if isinstance(error, ValueError) and text.startswith("Config group override must be a string"):
        return _nothing_chosen(arguments)
    if not isinstance(error, HydraException):
        return None
    if isinstance(error, OverrideParseException):
        return (
            f"an override must read key=value, got {error.override!r}; "
            "give a value, and quote one with other signs than /-_.: twice, once for the shell: 'key=\"a~b\"'"
        )
    if found := re.search(r"Could not (?:find|load) '([\w/]+)/([^'/]+)'", text):
        return _unknown_option(*found.groups())
    if found := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(found[1], config_name)
    if found := re.search(r"(?:Multiple values for|already at) '?([\w./]+?)'?[.\s]", text):
        return f"`{found[1]}` must be set without a plus, got +{found[1]}=…; write {found[1]}=… instead"
    if found := re.search(r"(?:Sweep parameters|Ambiguous value for argument) '([^']+)'", text):
        return (
            f"several values need a multirun, got {found[1]!r}; write -m right after the module's name, "
            "or key=[a,b] for a list"
        )
    return f"{_first_line(text)}; `--cfg job` prints the configuration"


def refuse_repeated(overrides: Sequence[str]) -> None:
    """Refuse a list that names a part twice: they would have one name, and be one.

    Raises:
        ConfigError: there is one.
    """
    for text in overrides:
        found = re.fullmatch(r"(\w+)=\[(.*)\]", text)
        names = [name.strip() for name in found[2].split(",")] if found else []
        twice = sorted({name for name in names if names.count(name) > 1})
        if found and twice and (CONF_DIR / found[1]).is_dir():
            raise ConfigError(
                f"`{found[1]}` must name each part once, got {twice[0]} {names.count(twice[0])} times; leave one "
                "out, or give the second a yaml file and a name of its own"
            )


def unknown_key(key: str, config_name: str) -> str:
    """Return the sentence about a key that the composed configuration does not have."""
    holders = _holders(config_name)
    if chosen := holders.get(key):
        return f"`{key}` must belong to a chosen part, got one that is not chosen; add {' or '.join(sorted(chosen))}"
    if _of_users(key):
        return f"`{key}` must be set with a plus, as a name of your own, got {key}=…; write +{key}=…"
    leaf = key.rpartition(".")[-1]
    meant = [name for name in holders if name.rpartition(".")[-1] == leaf]
    meant = meant or difflib.get_close_matches(key, holders, n=3)
    guess = f"use {' or '.join(meant)}" if meant else "remove it"
    return f"`{key}` must be a key of the configuration, got an unknown one; {guess} (`--cfg job` prints them all)"


def _of_users(key: str) -> bool:
    """Return whether a key lies in a dictionary that comes empty, for names of the user's own."""
    group, *names = key.split(".")
    for file in (CONF_DIR / group).glob("*.yaml"):
        node = yaml.safe_load(file.read_text())
        for name in names[:-1]:
            node = node.get(name) if isinstance(node, Mapping) else None
            if node == {}:
                return True
    return False


def _unknown_option(group: str, option: str) -> str:
    options = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    return f"`{group}` must be one of {', '.join(options)}, got {option!r}; choose one, or give --config-dir"


def _nothing_chosen(arguments: Sequence[str]) -> str:
    words = [word for word in arguments if word.endswith("=null")]
    group = words[0].removesuffix("=null") if words else "a group"
    options = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
    return f"`{group}` must be one of {', '.join(options)}, got null; choose one by its name"


def _first_line(text: str) -> str:
    return next(
        (line.strip() for line in text.splitlines() if line.strip()), "Hydra refused the command line"
    )


def _holders(config_name: str) -> dict[str, set[str]]:
    """Return every key that a command may have, each with the options that bring it."""
    holders: dict[str, set[str]] = defaultdict(set)
    root = yaml.safe_load((CONF_DIR / f"{config_name}.yaml").read_text())
    chosen = {
        name: option
        for entry in root["defaults"]
        if isinstance(entry, Mapping)
        for name, option in entry.items()
    }
    waiting = list(chosen)
    for name in root.keys() - {"defaults", "hydra"}:
        holders[name] = set()
    for group in waiting:  # grows on the way: an estimator brings the group of its divergence
        for file in sorted((CONF_DIR / group).glob("*.yaml")):
            name = f"[{file.stem}]" if isinstance(chosen.get(group), list) else file.stem
            option, content = f"{group}={name}", yaml.safe_load(file.read_text())
            for named, key in _PACKAGED.findall(file.read_text()):
                holders[key].add(option)
                waiting += [named] if named not in waiting else []
            if group not in ("experiment", "debug"):
                for key in _keys(content, group):
                    holders[key].add(option)
    return holders


def _keys(content: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in content.items():
        if name in ("defaults", "_target_", "_partial_"):
            continue
        yield f"{prefix}.{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}.{name}")
