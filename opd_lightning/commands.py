"""What the commands share: checking a configuration, building its parts, and leaving without a traceback."""

from __future__ import annotations

import functools
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_lightning.errors import ConfigError


def build(config: DictConfig, **more: Any) -> Any:
    """Instantiate a part from its configuration, as plain Python containers.

    Raises:
        ConfigError: what the part's own constructor refused, or a missing or unknown field.
    """
    try:
        return instantiate(config, **more, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise cause from None
            if cause.__cause__ is None:
                break
            cause = cause.__cause__
        target = config.get("_target_", "a part") if isinstance(config, DictConfig) else "a part"
        raise ConfigError(f"{target} cannot be built: {cause}") from error


def refuse_unknown_keys(config: DictConfig, known: set[str]) -> None:
    """Refuse top-level keys that nothing reads; Hydra lets ``+name=value`` through.

    Raises:
        ConfigError: there is one.
    """
    unknown = sorted(str(key) for key in config if str(key) not in known)
    if unknown:
        raise ConfigError(
            f"`{unknown[0]}` must be a key of the configuration, got an unknown one; known keys are "
            f"{', '.join(sorted(known))} (a preset is experiment=name, without a plus)"
        )


def command(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Wrap a Hydra main so that a mistake of the user's leaves one sentence on stderr and exit code 2."""

    @functools.wraps(main)
    def run(config: DictConfig) -> Any:
        try:
            return main(config)
        except (ConfigError, OmegaConfBaseException) as error:
            text = str(error).strip().splitlines()
            sentence = text[0] if text else type(error).__name__
            key = getattr(error, "full_key", None)
            if key and key not in sentence:
                sentence = f"`{key}`: {sentence}"
            print(f"error: {sentence}", file=sys.stderr, flush=True)
            sys.exit(2)

    return run


def git_commit() -> str | None:
    """Return the commit of the package's checkout with ``+`` for uncommitted changes, None outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty if tracked else None
    except (OSError, subprocess.CalledProcessError):
        return None


def plain(config: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """Return a configuration as plain dictionaries."""
    container = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def quiet() -> None:
    """Silence what says nothing about a run: device counts, loading bars, and warnings about other uses."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.accelerators").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r".*LeafSpec.* is deprecated.*",
        r".*Experiment logs directory .* exists and is not empty.*",
        r".*Checkpoint directory .* exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=message)
