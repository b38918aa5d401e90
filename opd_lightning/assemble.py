"""Putting the two halves of a run together from their parts; the commands and Python users share it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.buffer import micro_batch_count
from opd_lightning.clock import PhaseClock
from opd_lightning.collector import Collector, check_sizes, longest_row
from opd_lightning.data import Evaluation, OnPolicyData
from opd_lightning.diagnostics.utilisation import Meter
from opd_lightning.errors import ConfigError, require
from opd_lightning.layout import check_layout
from opd_lightning.loading import (
    FrozenScorer,
    Loading,
    Reference,
    TeacherSource,
    check_scratch,
    load_scorer,
    paired,
)
from opd_lightning.lora import Lora
from opd_lightning.models import check_compiled, check_dtype, stop_ids
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import Objective
from opd_lightning.prompts import Prompts
from opd_lightning.protocols import Engine, Follows, RolloutSampler, Scoring, Task
from opd_lightning.reference.initial import Initial
from opd_lightning.schedule import within
from opd_lightning.scorer import Scorer
from opd_lightning.types import Origin, Problem
from opd_lightning.writing import writers_for


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
) -> Run:
    """Load the models and build both halves around them, cheap checks first.

    ``head_scratch_mb`` bounds the logits that are alive at once, in MB, ``temperature`` is the scoring
    temperature, ``layout`` the way of the rows through the backbone, ``compiled`` whether torch.compile
    runs its layers, of every model alike. ``reference`` is loaded only if a part needs it (default: the
    starting student). ``lora`` puts adapters on the student, which are then all that is trained.
    ``peak_tflops`` is what utilisation is a share of, None to measure it.

    Raises:
        ConfigError: anything that cannot work, before a weight is read wherever possible.
    """
    _check_numbers(student_dtype, teacher.dtype, head_scratch_mb, temperature)
    check_layout(layout)
    check_compiled(compiled)
    _check_peak(peak_tflops)
    _check_budget(collector, rollout)
    _check_taught(objective, rollout)
    _check_weighted(objective, rollout)
    _check_hidden(objective, teacher)
    tokenizer, vocab = paired(student_path, teacher)
    most = max(objective.needs.teacher_top, objective.needs.student_top)
    require(most <= vocab, "support.k", f"be at most the vocabulary's {vocab} ids", most, "use support=full")
    objective = _bound(objective, tokenizer)
    training, validation = _prompts(task, tokenizer, collector, split, seed)
    adapt = None if lora is None else partial(lora.add_to, seed=seed)
    read = (vocab, head_scratch_mb, temperature, layout, compiled)
    student = load_scorer(student_path, "student.path", student_dtype, *read, adapt).train()
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
    )
    frozen = teacher.load(loading)
    _check_given_ids(objective, frozen)
    _check_changing(objective, frozen, collector.steps_per_collection, rollout)
    if isinstance(frozen, FrozenScorer):
        student.set_target("teacher", frozen.scorer)
    referred = (reference or Initial()).load(loading) if objective.needs.reference else None
    if referred is not None:
        student.set_target("reference", referred.scorer)
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
        prompts_per_collection=collector.prompts_per_collection,
        steps_per_collection=collector.steps_per_collection,
        score_rows=collector.score_rows,
        probe_rows=collector.probe_rows,
        score_tokens=collector.score_tokens,
        micro_batch_tokens=collector.micro_batch_tokens,
        clock=clock,
        meter=_metered(clock, student, frozen, referred),
    )
    follower = frozen if isinstance(frozen, Follows) else None
    module = OnPolicyDistillation(student, objective, optimizer, scheduler, follower)
    return Run(
        module=module,
        data=OnPolicyData(collecting, validation, evaluation, peak_tflops),
        teacher=frozen,
        tokenizer=tokenizer,
    )


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


def _check_numbers(
    student_dtype: str, teacher_dtype: str, head_scratch_mb: float, temperature: float
) -> None:
    check_dtype(student_dtype, "student.dtype")
    check_scratch(head_scratch_mb)
    check_dtype(teacher_dtype, "teacher.dtype")
    require(
        within(temperature, 1e-3, 1e3),
        "student.scoring_temperature",
        "be a number above 0",
        temperature,
        "use 1 for the models' own distributions",
    )


def _check_peak(peak_tflops: float | None) -> None:
    holds = peak_tflops is None or within(peak_tflops, 1e-6, 1e9)
    condition, remedy = "be a number above 0, or null", "use null to measure it"
    require(holds, "reporting.peak_tflops", condition, peak_tflops, remedy)


def _check_budget(collector: CollectorSettings, rollout: RolloutSampler) -> None:
    """Refuse a micro-batch that cannot hold the longest row."""
    if collector.micro_batch_tokens is not None:
        micro_batch_count(1, longest_row(rollout, collector.max_prompt_tokens), collector.micro_batch_tokens)


def _metered(clock: PhaseClock, student: Scorer, *frozen: Scoring | None) -> Meter:
    """Return what charges the clock with the arithmetic of all models in this process."""
    meter = Meter(clock.charge)
    for scorer in (student, *(model.scorer for model in frozen if isinstance(model, FrozenScorer))):
        meter.attach(scorer)
    return meter


def _bound(objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """Give the masks that name tokens by strings the student's tokenizer."""
    masks = {k: m.bind(tokenizer) if hasattr(m, "bind") else m for k, m in objective.masks.items()}
    return replace(objective, masks=masks)


_WRITES = {
    "student": Origin.STUDENT,
    "mixed": Origin.STUDENT,
    "teacher": Origin.TEACHER,
    "gold": Origin.DATA,
}


def _check_taught(objective: Objective, rollout: RolloutSampler) -> None:
    """Refuse a part that teaches nobody's tokens of these rollouts: it would change nothing, or the loss be 0."""
    written = {_WRITES[writer] for writer in rollout.writers}
    for name, teaches in objective.teachers.items():
        if teaches & written:
            continue
        taught, found = [
            " or ".join(sorted(o.name.lower() for o in origins)) for origins in (teaches, written)
        ]
        raise ConfigError(
            f"`rollout` must have tokens that {name} teaches, written by {taught}, got tokens of {found} alone; use "
            f"another rollout (mixture, teacher_text) or its gold or text, add {found} to the part's origins, or "
            "leave the part out"
        )


def _check_weighted(objective: Objective, rollout: RolloutSampler) -> None:
    """Refuse a score function on tokens that it takes for the student's and that both models drew together."""
    weighted = any(getattr(part, "weighs_sampled", False) for part in objective.regularizers.values())
    if "mixed" in rollout.writers and getattr(objective.estimator, "advantage", False) and not weighted:
        raise ConfigError(
            f"`regularizer` must hold importance weights for estimator {type(objective.estimator).__name__} on tokens "
            f"drawn from both models together, got {list(objective.regularizers) or 'none'}; add "
            "regularizer=[importance] regularizer.importance.of=sampler"
        )


def _check_given_ids(objective: Objective, teacher: Scoring) -> None:
    """Refuse a support that the student chooses beside a teacher that scores only its own top ids."""
    if objective.needs.student_top and not getattr(teacher, "scores_given_ids", True):
        raise ConfigError(
            f"`support` must be the teacher's own top ids for {type(teacher).__name__}, which cannot score given "
            f"ids, got {type(objective.support).__name__}; use support=teacher, or a teacher in this process"
        )


def _check_hidden(objective: Objective, teacher: TeacherSource) -> None:
    """Refuse a divergence over the whole vocabulary from a teacher that sends no hidden states."""
    needs = objective.needs
    read = needs.full or any(term.target == "teacher" for term in needs.collected_full)
    if read and not getattr(teacher, "gives_hidden", True):
        raise ConfigError(
            f"`support` must be selected ids with a served or cached teacher ({type(teacher).__name__}), which gives "
            f"no hidden states to compare whole vocabularies with, got {type(objective.support).__name__}; use "
            "support=teacher or support=student, or a teacher in this process without a cache"
        )


def _check_changing(objective: Objective, teacher: Scoring, steps: int, rollout: RolloutSampler) -> None:
    """Refuse a teacher that changes, or that has a prompt of its own, where another one is read."""
    follows = isinstance(teacher, Follows) and objective.needs.full and steps > 1
    require(
        not follows,
        "collector.steps_per_collection",
        "be 1 with support=full and a teacher that follows the student, whose head would be later than its states",
        steps,
        "use 1, another support, or teacher=self",
    )
    if "mixed" in rollout.writers and getattr(teacher, "view", None) is not None:
        raise ConfigError(
            "`rollout` must draw from one model beside a teacher with a context of its own, got both models mixed; "
            "use rollout=top_p, or teacher.context=null"
        )
