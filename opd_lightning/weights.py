"""Weights on disk: safetensors alone, whose reading runs no code, told from their headers."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import SafetensorError, safe_open

from opd_lightning.errors import ConfigError

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Files that are unpickled, which can run anything."""


def check_weights(folder: Path, path: str, field: str) -> None:
    """Refuse a folder without safetensors, or with broken ones. Headers are read, no weights.

    Args:
        folder: where the model lies; a hub name, which is no folder, is let pass.
        path: as the user wrote it, and ``field`` what names it, for errors.

    Raises:
        ConfigError: there are none, some are missing, or one cannot be read.
    """
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        _refuse_without(folder, path, field)
    for name in _shards(folder, path, field):
        if not (folder / name).is_file():
            raise ConfigError(
                f"`{field}` must hold every file of its index, got {path!r} without {name}; copy it again"
            )
    for file in files:
        try:
            with safe_open(file, "pt") as header:
                header.keys()
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"`{field}` must hold safetensors that can be read, got {path!r} with a broken {file.name} "
                f"({error}); copy it again"
            ) from error


def _refuse_without(folder: Path, path: str, field: str) -> None:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise ConfigError(
            f"`{field}` must hold its weights as safetensors, got {path!r} with {pickled[0]} alone, a pickle, which "
            "can run code when it is read; where you trust it, load it once with transformers and save_pretrained "
            "it to a new folder"
        )
    raise ConfigError(
        f"`{field}` must hold its weights as safetensors, got {path!r} with none; copy model.safetensors "
        "(or its shards and their index) beside config.json"
    )


def _shards(folder: Path, path: str, field: str) -> list[str]:
    """Return the files that an index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"`{field}` must hold an index of its weights that can be read, got {path!r} with a broken {index.name} "
            f"({type(error).__name__}); copy it again"
        ) from error


def parameters(folder: Path) -> int:
    """Return how many numbers the safetensors of a folder hold, 0 where there are none."""
    count = 0
    for file in folder.glob("*.safetensors") if folder.is_dir() else ():
        with safe_open(file, "pt") as header:
            count += sum(math.prod(header.get_slice(name).get_shape()) for name in header.keys())  # noqa: SIM118
    return count
