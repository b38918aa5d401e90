"""Checkpoint files: written whole or not at all, read without executing code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

log = logging.getLogger(__name__)

_STEP = re.compile(r"step=(\d+)")


class WholeFiles(TorchCheckpointIO):
    """Writes each checkpoint beside its place and moves it there when it is on the disk.

    A kill, a full disk or a power cut then leaves the checkpoints before as they were. One that cannot be
    written is reported, and none is removed until one could be written again.
    """

    def __init__(self) -> None:
        self.failed = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; say so where the disk refuses it, and go on."""
        path, outer = Path(path), sys.exception()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._beside(path) as file:
                torch.save(checkpoint, file)
            self.failed = False
        except (OSError, RuntimeError) as error:
            told = _cause(error, outer)
            if told is error and not isinstance(told, OSError):
                raise
            if not isinstance(told, OSError):
                raise told from None
            self.failed = True
            log.error(
                "the checkpoint %s could not be written (%s); the run goes on and keeps those before it: free "
                "space in %s, or make it writable",
                path.name,
                told,
                path.parent,
            )

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint whose successor is on the disk."""
        if not self.failed:
            super().remove_checkpoint(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Read a checkpoint, without executing code whatever ``weights_only`` says."""
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)

    def open(self, path: Path) -> IO[bytes]:
        """Open the file that is written."""
        return path.open("wb")

    @contextlib.contextmanager
    def _beside(self, path: Path) -> Iterator[IO[bytes]]:
        part = path.with_name(f".{path.name}.part")
        try:
            with self.open(part) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        _sync(path.parent)


def _cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """Return what the system said, or what a signal raised, in place of what became of it.

    torch's own writer stumbles over either once more and raises a RuntimeError; ``outer`` was there before.
    """
    cause: BaseException | None = error
    while cause is not None and cause is not outer:
        if isinstance(cause, OSError) or not isinstance(cause, Exception):
            return cause
        cause = cause.__context__
    return error


def _sync(folder: Path) -> None:
    """Have the folder's entry on the disk too, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def written(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a run with their optimizer steps, the latest first."""
    found = [
        (int(m.group(1)), path)
        for path in (folder / "checkpoints").glob("*.ckpt")
        if (m := _STEP.search(path.name))
    ]
    return sorted(found, key=lambda item: (item[0], item[1].stat().st_mtime), reverse=True)


def readable(path: Path) -> dict[str, Any] | None:
    """Return a checkpoint's content on the CPU, None where the file is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # Whatever is wrong with it: an older one is the better choice, and it is said.
        log.warning("%s cannot be read (%s) and is left out", path, str(error).splitlines()[0])
        return None
    return content if isinstance(content, dict) and "global_step" in content else None
