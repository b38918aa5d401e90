"""From a run's configuration, as plain values, and its cheap parts to the numbers that an estimate follows from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from opd_lightning.errors import require
from opd_lightning.lora import Lora
from opd_lightning.models import check_dtype
from opd_lightning.objective import Objective
from opd_lightning.planning.run import Compute, Frozen, PlannedRun, Sharding
from opd_lightning.planning.shapes import ModelShape
from opd_lightning.protocols import RolloutSampler
from opd_lightning.schedule import value_at, within

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no configuration says, or only the data and the machine do.

    Args:
        prompt_tokens: of a prompt; None for ``collector.max_prompt_tokens``, the bound.
        response_share: mean response over the longest.
        cpu_tflops: of one process on CPUs; None to measure it here, by a matrix product.
        gpu_tflops: of one GPU.
        utilisation: share of the peak by phase: generate, score, train, evaluate.
        gpus_per_node: processes of a node, where ``trainer.devices`` does not say how many.
        runtime_mb: what libraries and the device's context take.

    Raises:
        ConfigError: a number out of its range.
    """

    prompt_tokens: int | None
    response_share: float
    cpu_tflops: float | None
    gpu_tflops: float
    utilisation: Mapping[str, float]
    gpus_per_node: int
    runtime_mb: float

    def __post_init__(self) -> None:
        prompts = self.prompt_tokens is None or within(self.prompt_tokens, 1, 1e9)
        remedy = "use null for collector.max_prompt_tokens"
        require(
            prompts, "planning.prompt_tokens", "be a number of tokens, or null", self.prompt_tokens, remedy
        )
        share = within(self.response_share, 1e-6, 1)
        require(share, "planning.response_share", "be in (0, 1]", self.response_share, "use 1")
        peak = self.cpu_tflops is None or within(self.cpu_tflops, 1e-6, 1e9)
        require(peak, "planning.cpu_tflops", "be above 0, or null", self.cpu_tflops, "use null")
        peak = within(self.gpu_tflops, 1e-6, 1e9)
        require(peak, "planning.gpu_tflops", "be above 0", self.gpu_tflops, "use the data sheet's number")
        for phase in ("generate", "score", "train", "evaluate"):
            value = dict(self.utilisation).get(phase)
            require(
                within(value, 1e-9, 1),
                f"planning.utilisation.{phase}",
                "be in (0, 1]",
                value,
                "use 0.3, or what time/mfu of a run says",
            )
        node = isinstance(self.gpus_per_node, int) and self.gpus_per_node >= 1
        require(node, "planning.gpus_per_node", "be at least 1", self.gpus_per_node, "use 8")
        require(
            within(self.runtime_mb, 0, 1e9),
            "planning.runtime_mb",
            "be at least 0",
            self.runtime_mb,
            "use 700",
        )


def planned_run(
    values: Values,
    objective: Objective,
    rollout: RolloutSampler,
    optimizer: Callable[..., torch.optim.Optimizer],
    assumed: Assumptions,
    *,
    lora: Lora | None = None,
    processes: int | None = None,
) -> PlannedRun:
    """Return a run's numbers. No weight is read and no device is asked.

    Args:
        values: the configuration of ``train`` as plain dictionaries.
        objective: its parts decide what is collected and what the head computes.
        rollout: its lengths and writers.
        optimizer: from parameters to an optimizer; a step on one weight tells its state.
        assumed: what the configuration does not say.
        lora: the student's adapters.
        processes: in place of ``trainer.devices * trainer.num_nodes``.

    Raises:
        ConfigError: a model's configuration cannot be read, or prompts that do not divide over the processes.
    """
    student, trainer, collector = values["student"], values["trainer"], values["collector"]
    shape = ModelShape.at(student["path"], "student.path", lora, _trusts(student))
    size, engine, needs = world(values, assumed), values["engine"], objective.needs
    longest, mean = lengths(rollout, assumed)
    evaluation = values["evaluation"]
    questions = evaluation["settings"]
    cached = engine.get("kv_cache_mb") if "vllm" in engine["_target_"] else None
    return PlannedRun(
        student=shape,
        width=_width(student["dtype"], "student.dtype"),
        compute=_compute(student["dtype"], str(trainer["precision"])),
        frozen=tuple(_frozen(values, shape, objective)),
        optimizer_states=state_share(optimizer),
        optimizer_fused=bool(getattr(optimizer, "keywords", {}).get("fused")),
        sharding=sharding(values["strategy"]),
        processes=processes or size[0],
        nodes=size[1],
        device="cpu" if trainer["accelerator"] == "cpu" else "cuda",
        checkpointing=bool(student.get("gradient_checkpointing") or student.get("checkpointing")),
        prompts=collector["prompts_per_collection"],
        collection_steps=collector["steps_per_collection"],
        samples=rollout.samples,
        steps=trainer["max_steps"],
        accumulate=trainer["accumulate_grad_batches"],
        micro_batch_tokens=collector["micro_batch_tokens"],
        prompt_tokens=assumed.prompt_tokens or collector["max_prompt_tokens"],
        longest=longest,
        mean=mean,
        support=0 if needs.full or not needs.support else _support_size(objective),
        full=needs.full,
        exact_learning=_exact(objective),
        student_scored=needs.collected_logp
        or needs.collected_entropy
        or bool(needs.collected_full)
        or needs.student_top > 0,
        probe_rows=collector["probe_rows"],
        score_rows=collector["score_rows"],
        score_tokens=collector["score_tokens"],
        scratch=student["head_scratch_mb"] * 2**20,
        writers=frozenset(rollout.writers),
        engine=_engine(engine),
        engine_rows=engine.get("batch_size") or engine.get("rows") or engine.get("in_flight") or 128,
        engine_cache=None if cached is None else cached * 2.0**20,
        evaluations=_evaluations(evaluation["every_steps"], trainer["max_steps"]),
        evaluation_rows=(questions["problems"] or 1000) * (1 + questions["samples"]),
        evaluation_tokens=questions["max_new_tokens"],
        runtime=assumed.runtime_mb * 1e6,
    )


def world(values: Values, assumed: Assumptions) -> tuple[int, int]:
    """Return processes and nodes of a configuration."""
    trainer = values["trainer"]
    devices, nodes = trainer["devices"], int(trainer["num_nodes"])
    if isinstance(devices, list | tuple):
        local = len(devices)
    elif str(devices).isdigit():
        local = int(devices)
    elif "," in str(devices):
        local = len([part for part in str(devices).split(",") if part.strip()])
    else:  # auto or -1: what is there, which need not be this machine
        local = 1 if trainer["accelerator"] == "cpu" else assumed.gpus_per_node
    require(local >= 1 and nodes >= 1, "trainer.devices", "be at least 1", devices, "use trainer.devices=8")
    return local * nodes, nodes


def lengths(rollout: RolloutSampler, assumed: Assumptions) -> tuple[int, float]:
    """Return the longest response of a run, and the mean one over its progress."""
    budget = getattr(rollout, "max_new_tokens", None)
    require(
        budget is not None,
        "rollout.max_new_tokens",
        "say how long responses may become",
        type(rollout).__name__,
        "give the rollout a field max_new_tokens",
    )
    assert budget is not None
    values = [max(1.0, float(value_at(budget, step / 100))) for step in range(101)]
    return math.ceil(max(values)), assumed.response_share * sum(values) / len(values)


def state_share(optimizer: Callable[..., torch.optim.Optimizer]) -> float:
    """Return the bytes of state that an optimizer keeps for a byte of weights, tried on one matrix."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    try:
        made = optimizer([weight])
        weight.grad = torch.ones_like(weight)
        made.step()
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # one that wants names, groups or a closure: taken for Adam's two
        return 2.0
    state = made.state.get(weight, {})
    held = sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    return held / (weight.numel() * weight.element_size())


def sharding(strategy: Values) -> Sharding:
    """Return what a strategy's configuration divides over the processes."""
    target = str(strategy.get("_target_", strategy.get("name", "auto")))
    name = target.rsplit(".", 1)[-1].lower()
    if "deepspeed" in target.lower():
        stage = int(strategy.get("stage", 2))
        return Sharding(
            name=f"DeepSpeed ZeRO-{stage}", optimizer=stage >= 1, gradients=stage >= 2, weights=stage >= 3
        )
    if "fsdp" in name or "modelparallel" in name:
        return Sharding(name=name, weights=True, gradients=True, optimizer=True)
    return Sharding(name="auto" if name == "auto" else "ddp", buckets=True)


def _frozen(values: Values, student: ModelShape, objective: Objective) -> Iterator[Frozen]:
    yield from _teachers(values["teacher"], "teacher.path", "float32", student)
    if not objective.needs.reference:
        return
    reference, dtype = values.get("reference") or {}, values["student"]["dtype"]
    path = reference.get("path")
    shape = student if path is None else ModelShape.at(path, "reference.path", trust=_trusts(reference))
    alone = "adapter" not in str(reference.get("_target_", ""))
    width = _width(reference.get("dtype") or dtype, "reference.dtype")
    yield Frozen(role="reference", shape=shape, width=width, copy=alone, host=_waits(reference))


def _teachers(teacher: Any, field: str, dtype: str, student: ModelShape) -> Iterator[Frozen]:
    """Yield the teachers in this process: one, or those of a router; a served one is elsewhere."""
    if isinstance(teacher, str):
        teacher = {"path": teacher}
    if not isinstance(teacher, Mapping) or teacher.get("address"):
        return
    dtype = teacher.get("dtype") or dtype
    if "teachers" in teacher:
        for name, inner in (teacher["teachers"] or {}).items():
            yield from _teachers(inner, f"teacher.teachers.{name}", dtype, student)
        yield from _teachers(teacher.get("default"), "teacher.default", dtype, student)
    elif teacher.get("path"):
        live = teacher.get("weights") == "live"
        shape = student if live else ModelShape.at(teacher["path"], field, trust=_trusts(teacher))
        width = quantised_bytes(teacher.get("quantization")) or _width(dtype, field.replace("path", "dtype"))
        place = {"copy": not live, "host": _waits(teacher), "divided": bool(teacher.get("shard"))}
        yield Frozen(role="teacher", shape=shape, width=width, **place)


def quantised_bytes(quantization: object) -> float | None:
    """Return about how many bytes a weight has, scales with it, by what a way to quantise is called; None for whole."""
    words = str(quantization or "").lower()
    if not words:
        return None
    return 0.56 if re.search(r"4.?bit|bits\W+4\b|(int|fp|float|nf|nv)4", words) else 1.06


def _waits(model: Values) -> bool:
    return bool(model.get("offload")) and str(model.get("offload")).lower() not in ("none", "false")


def _trusts(model: Values) -> bool:
    return bool(model.get("trust_remote_code", False))


def _width(dtype: str, field: str) -> float:
    check_dtype(dtype, field)
    return float(getattr(torch, dtype).itemsize)


def _compute(dtype: str, precision: str) -> Compute:
    if getattr(torch, dtype).itemsize < 4:
        return "half"
    return "mixed" if "mixed" in precision else "float32"


def _support_size(objective: Objective) -> int:
    needs = objective.needs
    return objective.support.size or max(needs.teacher_top + needs.student_top, 1)


def _exact(objective: Objective) -> bool:
    want = objective.want
    return want.taken or want.entropy or bool(want.top) or want.support == "exact" or bool(want.full)


def _engine(engine: Values) -> str:
    target = str(engine["_target_"]).lower()
    if "server" in target or engine.get("url"):
        return "server"
    return "copy" if "vllm" in target else "here"


def _evaluations(every: int | None, steps: int) -> int:
    return 2 if every is None else 2 + (steps - 1) // every
