"""Finding the run that a command goes on with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.errors import ConfigError, require
from opd_lightning.resume.files import checkpoints, readable

log = logging.getLogger(__name__)

_HANDED_ON = "OPD_LIGHTNING_RESUME"
"""Environment variable by which a process tells those that it starts what it found."""

_FREE = ("resume", "strategy", "logger", "callbacks", "reporting")
"""Groups that may differ between the parts of one run."""

_FREE_OF_TRAINER = ("devices", "num_nodes", "accelerator", "enable_progress_bar", "log_every_n_steps")


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """A run to go on with: its folder, its latest whole checkpoint and that one's optimizer step.

    ``checkpoint`` is None for a run that was cut off before its first: it begins anew in its folder. ``finished``
    says that it has taken all the steps that are wanted.
    """

    folder: Path
    checkpoint: Path | None
    step: int
    finished: bool = False


def find(wanted: str | None, config: Mapping[str, Any], folder: Path, depth: int) -> Earlier | None:
    """Return the run that ``resume=wanted`` means, None to begin a new one.

    ``auto`` is the run in ``folder``, if there is one, else the latest that was begun with the same
    configuration beside it: ``depth`` folders up and as many down. Anything else is the folder of a run.
    A finished run whose folder is named goes on where more steps are wanted now; that of another command is left
    as it is, since its results would be replaced.

    Args:
        wanted: the value of ``resume``.
        config: this command's configuration, resolved.
        folder: that of the new run.
        depth: folders between runs and what holds them all, 0 for a folder that was given.

    Raises:
        ConfigError: a folder without a run, of one with another student, or of a finished one with fewer steps
            and without a checkpoint; or no number of steps.
    """
    if wanted is None:
        return None
    if handed := os.environ.get(_HANDED_ON):
        return _from_text(handed)
    found = _latest(config, folder, depth) if wanted == "auto" else _named(Path(wanted), config)
    if found is not None:
        os.environ[_HANDED_ON] = _to_text(found)
    return found


def forget() -> None:
    """Forget what was found, for the next job of a multirun in this process."""
    os.environ.pop(_HANDED_ON, None)


def _latest(config: Mapping[str, Any], folder: Path, depth: int) -> Earlier | None:
    if _saved(folder / "config.yaml") is not None:
        return _named(folder, config)
    root = folder.parents[depth - 1] if depth else folder
    same = _comparable(config, folder)
    known = root.glob("/".join(["*"] * depth) + "/config.yaml") if depth else iter(())
    latest = sorted(known, key=lambda p: p.stat().st_mtime, reverse=True)
    for path in latest:
        # A grid's jobs differ in what they are told and in the folder's own name.
        saved = _saved(path)
        if (
            saved is not None
            and _comparable(saved, path.parent) == same
            and (found := _of(path.parent, _planned(config), begin_anew=False)) is not None
        ):
            return found
    _say_shorter(latest, config, same)
    return None


def _say_shorter(latest: Iterable[Path], config: Mapping[str, Any], same: str) -> None:
    """Name the latest finished run that is this one but for fewer steps."""
    for path in latest:
        saved, ended = _saved(path), _ended(path.parent)
        if saved is None or ended is None or ended >= _planned(config):
            continue
        saved["trainer"]["max_steps"] = _planned(config)
        if _comparable(saved, path.parent) == same:
            told = "a run like this one has finished after %d steps in %s: resume=%s goes on with it; this one is new"
            log.info(told, ended, path.parent, path.parent)
            return


def _named(folder: Path, config: Mapping[str, Any]) -> Earlier:
    theirs, ours = _saved(folder / "config.yaml"), yaml.safe_load(_comparable(config, folder))
    if theirs is None:
        raise ConfigError(
            f"`resume` must be null, auto or the folder of a run, got {str(folder)!r}, which has no config.yaml of "
            "one; name the folder that the run printed, or use resume=auto"
        )
    for key in ("path", "dtype", "lora"):
        was, now = theirs["student"].get(key), ours["student"].get(key)
        if was != now:
            raise ConfigError(
                f"`student.{key}` must be that of the run in {folder}, {was!r}, got {now!r}; leave it as it was, or "
                "begin a new run with resume=null"
            )
    found = _of(folder, _planned(config), begin_anew=True)
    assert found is not None
    return found


def differences(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the settings, by dotted name, in which ``config`` is not that of the run in ``folder``."""
    saved = _saved(folder / "config.yaml") or {"trainer": {}}
    theirs = _flat(yaml.safe_load(_comparable(saved, folder)))
    ours = _flat(yaml.safe_load(_comparable(config, folder)))
    return sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _of(folder: Path, planned: int, *, begin_anew: bool) -> Earlier | None:
    """Return the run of a folder as it can go on; without a checkpoint only if it may begin anew there."""
    ended = _ended(folder)
    done = ended is not None and ended >= planned
    for step, path in checkpoints(folder):
        if done or readable(path) is not None:
            return Earlier(folder=folder, checkpoint=path, step=step, finished=done)
    if ended is not None and not done:
        raise ConfigError(
            f"`trainer.max_steps` must be at most the {ended} of the finished run in {folder}, which has no checkpoint "
            f"to go on from, got {planned}; begin a new run with resume=null, in another folder"
        )
    return Earlier(folder=folder, checkpoint=None, step=0, finished=done) if begin_anew or done else None


def _planned(config: Mapping[str, Any]) -> int:
    steps = config["trainer"]["max_steps"]
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
    require(whole, "trainer.max_steps", "be at least 1 optimizer step", steps, "use 320")
    return int(steps)


def _ended(folder: Path) -> int | None:
    """Return after how many optimizer steps the run of a folder has ended; None where it has not."""
    try:
        return int(json.loads((folder / "summary.json").read_text())["optimizer_steps"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def way_on(folder: Path) -> str:
    """Return a sentence on what a run that was cut off has left, and how to go on with it."""
    kept = checkpoints(folder)
    how = (
        f"from {kept[0][1].name}, its latest checkpoint"
        if kept
        else "from its beginning: it has no checkpoint"
    )
    return f"the same command with resume={folder} goes on {how}"


def _saved(path: Path) -> dict[str, Any] | None:
    """Return a run's configuration; None where there is none, or one that a kill cut off or another program's."""
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    known = isinstance(config, dict) and all(isinstance(config.get(k), dict) for k in ("student", "trainer"))
    return config if known else None


def refuse_another(folder: Path) -> None:
    """Refuse to begin a run where another one has left what would be taken for this one's.

    Raises:
        ConfigError: ``folder`` holds checkpoints, or the end of a run.
    """
    if (folder / "summary.json").exists() or checkpoints(folder):
        raise ConfigError(
            f"`hydra.run.dir` must be a folder without another run's checkpoints, got {str(folder)!r}; go on with that "
            "run by resume=auto, use another folder, or remove this one"
        )


def _comparable(config: Mapping[str, Any], folder: Path) -> str:
    kept = {key: value for key, value in config.items() if key not in _FREE}
    kept["trainer"] = {k: v for k, v in config["trainer"].items() if k not in _FREE_OF_TRAINER}
    text = yaml.safe_dump(json.loads(json.dumps(kept, default=str)), sort_keys=True, width=10_000)
    return text.replace(str(folder), "<folder>")


def _to_text(found: Earlier) -> str:
    return json.dumps([str(found.folder), str(found.checkpoint or ""), found.step, found.finished])


def _from_text(text: str) -> Earlier:
    folder, checkpoint, step, finished = json.loads(text)
    path = Path(checkpoint) if checkpoint else None
    return Earlier(folder=Path(folder), checkpoint=path, step=step, finished=finished)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into ``folder`` while the block runs; a kill gives it free.

    Raises:
        ConfigError: a run is alive there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".running").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"`hydra.run.dir` must be a folder that no other run writes to, got {str(folder)!r}, where one is "
                "alive; wait for it or stop it, or use another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
