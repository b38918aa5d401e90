"""Putting the two halves of a run together from their parts; the commands and Python users share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.checks import parts
from opd_lightning.clock import PhaseClock
from opd_lightning.collector import Collector
from opd_lightning.data import OnPolicyData
from opd_lightning.diagnostics.utilisation import Meter
from opd_lightning.errors import require
from opd_lightning.evaluation import Evaluation
from opd_lightning.layers import check_checkpointing, checkpoint_layers
from opd_lightning.loading import (
    FrozenScorer,
    Loading,
    ReadsProblems,
    Reference,
    TeacherSource,
    load_scorer,
    paired,
    scorers_of,
)
from opd_lightning.lora import Lora
from opd_lightning.models import stop_ids
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import Objective
from opd_lightning.prompts import Prompts
from opd_lightning.protocols import Engine, Follows, RolloutSampler, Scoring, Task
from opd_lightning.reference.initial import Initial
from opd_lightning.scorer import Scorer
from opd_lightning.sizes import check_sizes
from opd_lightning.types import Problem
from opd_lightning.writing import writers_for

_SOME = 256
"""Problems of a split that is made on the way that a teacher looks at before models are loaded."""


@dataclass(frozen=True, kw_only=True)
class CollectorSettings:
    """Numbers of the collecting half; see :class:`~opd_lightning.collector.Collector` and ``Prompts``."""

    prompts_per_collection: int
    steps_per_collection: int
    score_rows: int
    probe_rows: int
    max_prompt_tokens: int
    long_prompts: Literal["drop", "refuse"]
    prompt_pool: int | None = None
    score_tokens: int | None = None
    micro_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.prompts_per_collection, self.steps_per_collection, self.score_rows, self.probe_rows)
        check_sizes(*sizes, self.score_tokens)

    @property
    def sizes(self) -> dict[str, Any]:
        """What is the collector's own, and not its prompts'."""
        return {name: value for name, value in vars(self).items() if name not in _OF_PROMPTS}


_OF_PROMPTS = {"max_prompt_tokens", "long_prompts", "prompt_pool"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """An assembled run: ``lightning.Trainer(...).fit(run.module, run.data)`` trains it."""

    module: OnPolicyDistillation
    data: OnPolicyData
    teacher: Scoring
    tokenizer: PreTrainedTokenizerBase


def assemble(
    *,
    student_path: str,
    teacher: TeacherSource,
    task: Task,
    engine: Engine,
    rollout: RolloutSampler,
    objective: Objective,
    collector: CollectorSettings,
    evaluation: Evaluation,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    scheduler: Callable[[Optimizer, int], LRScheduler] | None,
    reference: Reference | None = None,
    student_dtype: str = "float32",
    head_scratch_mb: float = 256,
    temperature: float = 1.0,
    layout: str = "auto",
    compiled: bool = False,
    lora: Lora | None = None,
    split: str = "validation",
    seed: int = 0,
    peak_tflops: float | None = None,
    trust_remote_code: bool = False,
    gradient_checkpointing: bool = False,
) -> Run:
    """Load the models and build both halves around them, cheap checks first.

    ``head_scratch_mb`` bounds the logits that are alive at once, in MB, ``temperature`` is the scoring
    temperature, ``layout`` the way of the rows through the backbone, ``compiled`` whether torch.compile
    runs its layers, of every model alike. ``reference`` is loaded only if a part needs it (default: the
    starting student). ``lora`` puts adapters on the student, which are then all that is trained.
    ``peak_tflops`` is what utilisation is a share of, None to measure it. ``trust_remote_code`` lets code run
    that comes with the student's checkpoint. With ``gradient_checkpointing`` the student's layers are computed
    again in the backward pass, in place of being kept.

    Raises:
        ConfigError: anything that cannot work, before a weight is read wherever possible.
    """
    check_checkpointing(gradient_checkpointing)
    parts.numbers(student_dtype, teacher, head_scratch_mb, temperature, layout, compiled, peak_tflops)
    parts.budget(rollout, collector)
    parts.taught(objective, rollout)
    parts.weighted(objective, rollout)
    parts.hidden(objective, teacher)
    parts.given_ids(objective, teacher)
    parts.temperatures(teacher, temperature)
    parts.sharded(teacher, rollout, collector)
    tokenizer, vocab = paired(student_path, teacher, trust_remote_code)
    parts.support_size(objective, vocab)
    objective = _bound(objective, tokenizer)
    training, validation = _prompts(task, tokenizer, collector, split, seed)
    if isinstance(teacher, ReadsProblems):
        teacher.check_problems(training.known or training.problems[:_SOME])
    adapt = None if lora is None else partial(lora.add_to, seed=seed)
    read = (vocab, head_scratch_mb, temperature, layout, compiled)
    student = load_scorer(
        student_path, "student.path", student_dtype, *read, adapt, trust_remote_code
    ).train()
    if gradient_checkpointing:
        checkpoint_layers(student.model, student_path)
    stops = stop_ids(student.model, tokenizer)
    known = any(stop < vocab for stop in stops)
    require(known, "teacher.path", f"know the student's stop ids {stops}", vocab, "use a wider teacher")
    loading = Loading(
        student=student,
        student_path=student_path,
        student_dtype=student_dtype,
        tokenizer=tokenizer,
        vocab=vocab,
        scratch_mb=head_scratch_mb,
        temperature=temperature,
        layout=layout,
        compiled=compiled,
        max_prompt_tokens=collector.max_prompt_tokens,
        problems=training.known,
        trusted=trust_remote_code,
    )
    frozen = teacher.load(loading)
    parts.given_ids(objective, frozen)
    parts.changing(objective, frozen, rollout, collector)
    referred = (reference or Initial()).load(loading) if objective.needs.reference else None
    _aim(student, objective, frozen, referred)
    # Refuses writers that are not there.
    writers_for(engine, student, frozen, tokenizer, stops, rollout.writers)
    clock = PhaseClock()
    collecting = Collector(
        task=task,
        prompts=training,
        engine=engine,
        rollout=rollout,
        teacher=frozen,
        reference=referred,
        objective=objective,
        tokenizer=tokenizer,
        stop_ids=stops,
        clock=clock,
        meter=_metered(clock, student, frozen, referred),
        **collector.sizes,
    )
    follower = frozen if isinstance(frozen, Follows) else None
    module = OnPolicyDistillation(student, objective, optimizer, scheduler, follower)
    return Run(
        module=module,
        data=OnPolicyData(collecting, validation, evaluation, peak_tflops),
        teacher=frozen,
        tokenizer=tokenizer,
    )


def _aim(student: Scorer, objective: Objective, teacher: Scoring, reference: FrozenScorer | None) -> None:
    """Give the student's exact terms the heads of the models beside it that they read."""
    if isinstance(teacher, FrozenScorer):
        student.set_target("teacher", teacher.scorer)
        if objective.needs.full:
            teacher.keep_head()
    if reference is not None:
        student.set_target("reference", reference.scorer)


def _prompts(
    task: Task, tokenizer: PreTrainedTokenizerBase, settings: CollectorSettings, split: str, seed: int
) -> tuple[Prompts, Prompts | None]:
    """Return the training prompts, and the held-out ones if the task has them."""

    def prompts(problems: Sequence[Problem], seed: int, pool: int | None) -> Prompts:
        return Prompts(
            problems=problems,
            tokenizer=tokenizer,
            max_tokens=settings.max_prompt_tokens,
            long=settings.long_prompts,
            seed=seed,
            pool=pool,
        )

    training = prompts(task.problems("train"), seed, settings.prompt_pool)
    held_out = task.problems(split)
    return training, prompts(held_out, 0, None) if len(held_out) else None


def _metered(clock: PhaseClock, student: Scorer, *frozen: Scoring | None) -> Meter:
    """Return what charges the clock with the arithmetic of all models in this process."""
    meter = Meter(clock.charge)
    for scorer in (student, *(scorer for model in frozen for scorer in scorers_of(model))):
        meter.attach(scorer)
    return meter


def _bound(objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """Give the masks that name tokens by strings the student's tokenizer."""
    masks = {k: m.bind(tokenizer) if hasattr(m, "bind") else m for k, m in objective.masks.items()}
    return replace(objective, masks=masks)
