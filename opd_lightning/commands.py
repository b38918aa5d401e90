"""What the commands share: checking a configuration, building its parts, and leaving without a traceback."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import hydra
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from opd_lightning.errors import ConfigError, ProcessLost, RunStopped, require
from opd_lightning.overrides import dictionaries_replace, explain, refuse_repeated
from opd_lightning.paths import CONF_DIR
from opd_lightning.processes import first_process
from opd_lightning.redaction import hide


def folder_name(number: int | str, overrides: str) -> str:
    """Return the folder of a multirun's job: its overrides, short enough for a file system and without slashes.

    >>> folder_name(3, "estimator=topk,student.path=/models/a")
    'estimator=topk,student.path=-models-a'
    """
    name = re.sub(r"[/\\\s]+", "-", hide(overrides)) or str(number)
    if len(name.encode()) > _LONGEST_NAME:
        name = f"{number}-{name.encode()[: _LONGEST_NAME - 20].decode(errors='ignore')}"
    return name


_LONGEST_NAME = 200  # bytes; file systems stop at 255
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def build(config: DictConfig, **more: Any) -> Any:
    """Instantiate a part from its configuration, as plain Python containers.

    Raises:
        ConfigError: what the part's own constructor refused, or a missing or unknown field.
    """
    try:
        return instantiate(config, **more, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, ConfigError | MissingMandatoryValue):
            cause = cause.__cause__
        if isinstance(cause, ConfigError):
            raise _named_in_full(cause, str(error)) from None
        if isinstance(cause, MissingMandatoryValue):
            raise cause from None
        raise refused(config, cause) from error


def _named_in_full(error: ConfigError, text: str) -> ConfigError:
    """Return the error of a teacher inside ``teacher=router`` under its place there; others as they are.

    It calls its own settings ``teacher.…``. ``text`` is Hydra's, which knows the place.
    """
    place = re.search(r"full_key: (teacher\.\S+)", text)
    return error if place is None else type(error)(re.sub(r"^`teacher\.", f"`{place[1]}.", str(error)))


def refused(config: DictConfig, cause: BaseException) -> ConfigError:
    """Return the error of a part whose class does not take its settings; keys that it has no name for come first."""
    for node, keys in _left_over(config):
        path = node._get_full_key(None)
        names = ", ".join(keys)
        removals = " ".join(f"'~{path}.{key}'" for key in keys)
        return ConfigError(
            f"`{path}` must hold what {node._target_} takes, got {names} as well; "
            f"add {removals} where a preset or another choice set it, or leave it out"
        )
    return ConfigError(
        f"`{config._get_full_key(None)}` must hold what {config.get('_target_')} takes, got settings that it refuses "
        f"({cause}); correct them (`--cfg job` prints them)"
    )


def _left_over(config: DictConfig) -> Iterator[tuple[DictConfig, list[str]]]:
    """Yield each node below ``config`` with keys that its class has no name for, which Hydra may have merged in."""
    for value in config.values():
        if isinstance(value, DictConfig):
            yield from _left_over(value)
    if "_target_" not in config:
        return
    try:
        taken = inspect.signature(get_object(config._target_)).parameters
    except (ImportError, TypeError, ValueError):  # no such class, or one that does not tell
        return
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in taken.values()):
        keys = [str(key) for key in config if key not in taken and not str(key).startswith("_")]
        if keys:
            yield config, keys


def check_seed(seed: Any) -> None:
    """Refuse a seed that a random number generator would not take."""
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    require(whole and 0 <= seed < 2**32, "seed", "be a whole number in [0, 2**32)", seed, "use 0")


def refuse_unknown_keys(config: DictConfig, known: Set[str]) -> None:
    """Refuse keys that nothing reads; Hydra lets ``+name=value`` through.

    Args:
        config: of a command.
        known: its top-level keys, and ``"group.key"`` for each key of a group that no constructor checks.

    Raises:
        ConfigError: there is another.
    """
    _refuse_others(config, {name for name in known if "." not in name}, "")
    for group in {name.partition(".")[0] for name in known if "." in name}:
        inside = {name.partition(".")[2] for name in known if name.startswith(f"{group}.")}
        _refuse_others(config[group], inside, f"{group}.")


def _refuse_others(config: DictConfig, known: Set[str], prefix: str) -> None:
    unknown = sorted(str(key) for key in config if str(key) not in known)
    if unknown:
        raise ConfigError(
            f"`{prefix}{unknown[0]}` must be a key of the configuration, got an unknown one; use one of "
            f"{', '.join(sorted(known))} (a preset is experiment=name, without a plus)"
        )


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a function of a configuration a command: Hydra's main for the configuration ``config_name``.

    A mistake of the user's, in a setting or in the command line itself, leaves one sentence on stderr and
    exit code 2, a lost process of a run 75. A refused job of a multirun does not keep the others from running.
    Any other error keeps its traceback, and with HYDRA_FULL_ERROR=1 a broken command line does too.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        begun: list[bool] = []

        @functools.wraps(main)
        def job(config: DictConfig) -> Any:
            begun.append(True)
            try:
                refuse_repeated(HydraConfig.get().overrides.task)
                return main(config)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                _say(full_disk(error, HydraConfig.get().runtime.output_dir))
                sys.exit(2)
            except (ConfigError, OmegaConfBaseException) as error:
                _say(sentence_of(error))
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise
                sys.exit(_code(error))

        launch = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)

        @functools.wraps(main)
        def run() -> None:
            begun.clear()
            try:
                with _full_error() as wanted, dictionaries_replace():
                    launch()
            except (ConfigError, OmegaConfBaseException):
                sys.exit(2)  # a job of a multirun, which has said why
            except Exception as error:
                sentence = None if wanted else explain(error, config_name, sys.argv[1:])
                if sentence is None and isinstance(error, OSError) and error.filename and not begun:
                    sentence = _no_folder(error)
                if sentence is None:
                    raise
                _say(sentence)
                sys.exit(2)

        return run

    return decorate


def _code(error: Exception) -> int:
    """Return the exit code after an error of the user's; where all processes stop, the first one's is the run's."""
    if isinstance(error, ProcessLost):
        return error.code
    # Its watcher would take another one that leaves earlier, by another code than 0, for lost.
    return 2 if first_process() or not isinstance(error, RunStopped) else 0


_FULL = (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: OSError, folder: str) -> str:
    """Return the sentence about a disk without room."""
    return (
        f"the disk of {folder} must have room, got none for {error.filename or 'a file'} ({error.strerror}); free some "
        "and start again, with resume=auto to go on, or choose another disk with hydra.run.dir=…"
    )


def _no_folder(error: OSError) -> str:
    """Return the sentence about a run's folder that Hydra could not make."""
    return (
        f"`hydra.run.dir` must be a folder that can be written, got {error.filename!r} ({error.strerror}); "
        "choose another"
    )


@contextlib.contextmanager
def _full_error() -> Iterator[bool]:
    """Have Hydra raise its errors in place of printing them, and say whether the user wanted that anyway."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield before == "1"
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _say(sentence: str) -> None:
    print(f"error: {hide(sentence)}", file=sys.stderr, flush=True)


def sentence_of(error: Exception) -> str:
    """Return what an error of the user's says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return f"`{key}` must be given, got nothing; add {key}=…"
    if isinstance(error, OmegaConfBaseException):
        text = str(error).strip().splitlines()[0]
    return text if not key or key in text else f"`{key}`: {text}"


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
    """Silence what says nothing about a run: device counts, loading bars, requests, warnings about other uses."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.accelerators").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",
        r".*Total length of `list` across ranks is zero.*",
        r".*LeafSpec.* is deprecated.*",
        r".*Experiment logs directory .* exists and is not empty.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*your dataloader is not resumable.*",  # its state is the data module's
    ):
        warnings.filterwarnings("ignore", message=message)
