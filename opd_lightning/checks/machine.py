"""What a run needs of its machine: devices, a folder that can be written, and room on the disk."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.optim import Optimizer

from opd_lightning.checks.finding import Finding, ok, refuse, warning
from opd_lightning.errors import ConfigError, require
from opd_lightning.lora import Lora
from opd_lightning.objective import Objective
from opd_lightning.paths import CONF_DIR, model_path
from opd_lightning.planning.estimate import estimated_memory
from opd_lightning.planning.settings import Assumptions
from opd_lightning.protocols import RolloutSampler
from opd_lightning.weights import parameters

_STATE = 12
"""Bytes of a trained weight in a checkpoint: float32, with the two moments of Adam."""

_KNOWN = ("weights", "gradients", "optimizer")
"""Parts of a process's memory that are no estimate."""


def devices(trainer: Mapping[str, Any]) -> Iterator[Finding]:
    """Refuse more GPUs than there are; warn of more processes than cores."""
    asked, accelerator = trainer.get("devices"), trainer.get("accelerator")
    count = int(str(asked)) if str(asked).isdigit() else 0
    if accelerator in ("gpu", "cuda"):
        there = torch.cuda.device_count()
        remedy = f"use trainer.devices={there}" if there else "use trainer=cpu"
        require(there > 0, "trainer.accelerator", "be cpu on a machine without a GPU", accelerator, remedy)
        require(count <= there, "trainer.devices", f"be at most the {there} GPUs here", asked, remedy)
        yield ok("trainer.devices", f"{count or there} of {there} GPUs")
    elif accelerator == "cpu":
        cores = os.cpu_count() or 1
        if count > cores:
            yield warning(
                "trainer.devices", f"be at most the {cores} cores here", asked, f"use trainer.devices={cores}"
            )
        else:
            yield ok("trainer.devices", f"{count or 1} of {cores} cores")


def clipping(trainer: Mapping[str, Any]) -> None:
    """Refuse a norm to clip gradients to that is none: with a negative one the step would go uphill."""
    norm = trainer.get("gradient_clip_val")
    number = isinstance(norm, int | float) and not isinstance(norm, bool) and 0 <= norm < math.inf
    remedy = "use 1.0, or null for no clipping"
    require(norm is None or number, "trainer.gradient_clip_val", "be a norm of at least 0", norm, remedy)


def run_folder(folder: Path) -> Iterator[Finding]:
    """Refuse a folder for the run that cannot be written, by writing a file to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"`hydra.run.dir` must be a folder that can be written, got {str(folder)!r} ({error.strerror}); "
            "choose another"
        ) from error
    yield ok("hydra.run.dir", f"{folder} can be written")


def disk(folder: Path, student_path: str) -> Iterator[Finding]:
    """Refuse a disk without room for one checkpoint and the trained student; warn below three.

    The size is 12 bytes a weight for a checkpoint, and that of its own file for the student.
    """
    source = Path(model_path(student_path))
    count = parameters(source)
    if not count:
        return
    student = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    least, most = _STATE * count + student, 3 * _STATE * count + student
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < least:
        refuse(
            "hydra.run.dir",
            f"have {_gb(least)} free for a checkpoint and the trained student",
            f"{_gb(free)} at {place}",
            "free some, or choose a folder on another disk",
        )
    if free < most:
        remedy = "free some, or choose a folder on another disk"
        yield warning(
            "hydra.run.dir", f"have {_gb(most)} free for three checkpoints", f"{_gb(free)} at {place}", remedy
        )
    else:
        yield ok("hydra.run.dir", f"{_gb(free)} free, a checkpoint takes about {_gb(_STATE * count)}")


def memory(
    values: Mapping[str, Any],
    objective: Objective,
    rollout: RolloutSampler,
    optimizer: Callable[..., Optimizer],
    lora: Lora | None,
) -> Iterator[Finding]:
    """Refuse what is held all the time where it exceeds the memory; warn where the estimated peak comes near.

    Weights, gradients and the optimizer's state are known; activations are an estimate of
    :mod:`opd_lightning.planning`, which single processes exceeded by up to 15 % where it was measured.
    """
    trainer = values["trainer"]
    if any(model.get("trust_remote_code") for model in (values["student"], values["teacher"])):
        return  # shapes of a class that is not known here
    assumed = yaml.safe_load((CONF_DIR / "planning" / "default.yaml").read_text())
    assumed.pop("_target_")
    need = estimated_memory(values, objective, rollout, optimizer, Assumptions(**assumed), lora)
    there = memory_there(trainer["accelerator"] != "cpu")
    if there is None:
        return
    here = int(trainer["devices"]) if trainer["accelerator"] == "cpu" else 1  # processes that share it
    known = {name: size for name, size in need.held.items() if any(word in name for word in _KNOWN)}
    held, peak = here * sum(known.values()), here * need.peak
    parts = sorted(known.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {_gb(size)}" for name, size in parts[:3])
    remedy = "use a smaller model, student/lora=default, another strategy, or more memory"
    field = "student.path"
    if held > there:
        refuse(field, f"fit into {_gb(there)} of memory", f"{_gb(held)} ({largest})", remedy)
    if peak > 0.9 * there:
        remedy = "lower collector.score_rows, collector.micro_batch_tokens or engine.batch_size"
        yield warning(
            field, f"leave a tenth of {_gb(there)} of memory free", f"an estimated {_gb(peak)}", remedy
        )
    else:
        yield ok("memory", f"an estimated {_gb(peak)} of {_gb(there)}, for {here} here: {largest}")


def memory_there(cuda: bool) -> float | None:
    """Return the bytes of a GPU, or of this machine as far as this process may use them; None if unknown."""
    if cuda:
        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    limits = [float(pages * size)] if pages > 0 else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup") / name
        text = file.read_text().strip() if file.is_file() else ""
        limits += [float(text)] if text.isdigit() else []
    return min(limits, default=None)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
