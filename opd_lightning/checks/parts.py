"""Parts against each other: what cannot work together, whatever the models."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from opd_lightning.buffer import micro_batch_count
from opd_lightning.checks.facts import ModelFacts
from opd_lightning.errors import ConfigError, require
from opd_lightning.layers import check_compiled
from opd_lightning.layout import check_layout
from opd_lightning.loading import TeacherSource, check_scratch, same_temperature
from opd_lightning.models import check_dtype
from opd_lightning.objective import Objective
from opd_lightning.protocols import Follows, RolloutSampler, Scoring
from opd_lightning.schedule import within
from opd_lightning.sizes import longest_row
from opd_lightning.types import Origin


@runtime_checkable
class Sizes(Protocol):
    """Numbers of the collecting half; see :class:`~opd_lightning.assemble.CollectorSettings`."""

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt."""
        ...

    @property
    def steps_per_collection(self) -> int:
        """Optimizer steps on one collection."""
        ...

    @property
    def micro_batch_tokens(self) -> int | None:
        """Most tokens of a micro-batch."""
        ...

    @property
    def score_tokens(self) -> int | None:
        """Most tokens of a scorer's forward."""
        ...


def numbers(
    student_dtype: str,
    teacher: TeacherSource,
    head_scratch_mb: float,
    temperature: float,
    layout: str,
    compiled: bool,
    peak_tflops: float | None,
) -> None:
    """Refuse a number or a name that is out of its range."""
    check_dtype(student_dtype, "student.dtype")
    check_scratch(head_scratch_mb)
    check_dtype(teacher.dtype, "teacher.dtype")
    require(
        within(temperature, 1e-3, 1e3),
        "student.scoring_temperature",
        "be a number above 0",
        temperature,
        "use 1 for the models' own distributions",
    )
    check_layout(layout)
    check_compiled(compiled)
    holds = peak_tflops is None or within(peak_tflops, 1e-6, 1e9)
    condition, remedy = "be a number above 0, or null", "use null to measure it"
    require(holds, "reporting.peak_tflops", condition, peak_tflops, remedy)


def temperatures(teacher: TeacherSource, temperature: float) -> None:
    """Refuse a teacher that scores at another temperature than the student, or that cannot score at it."""
    same_temperature(
        getattr(teacher, "scoring_temperature", None), temperature, "teacher.scoring_temperature"
    )
    check = getattr(teacher, "check_temperature", None)
    if check is not None:
        check(temperature)


def support_size(objective: Objective, vocab: int) -> None:
    """Refuse more ids at a position than the vocabulary has."""
    most = max(objective.needs.teacher_top, objective.needs.student_top)
    require(most <= vocab, "support.k", f"be at most the vocabulary's {vocab} ids", most, "use support=full")


def own_support_size(objective: Objective, student: ModelFacts) -> None:
    """Refuse more ids at a position than the student's vocabulary has, for a teacher whose width is not known yet."""
    support_size(objective, student.width)


def budget(rollout: RolloutSampler, collector: Sizes) -> None:
    """Refuse a micro-batch that cannot hold the longest row."""
    if collector.micro_batch_tokens is not None:
        micro_batch_count(1, longest_row(rollout, collector.max_prompt_tokens), collector.micro_batch_tokens)


_WRITES = {
    "student": Origin.STUDENT,
    "mixed": Origin.STUDENT,
    "teacher": Origin.TEACHER,
    "gold": Origin.DATA,
}


def taught(objective: Objective, rollout: RolloutSampler) -> None:
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


def weighted(objective: Objective, rollout: RolloutSampler) -> None:
    """Refuse a score function on tokens that it takes for the student's and that both models drew together."""
    weighted = any(getattr(part, "weighs_sampled", False) for part in objective.regularizers.values())
    if "mixed" in rollout.writers and getattr(objective.estimator, "advantage", False) and not weighted:
        raise ConfigError(
            f"`regularizer` must hold importance weights for estimator {type(objective.estimator).__name__} on tokens "
            f"drawn from both models together, got {list(objective.regularizers) or 'none'}; add "
            "regularizer=[importance] regularizer.importance.of=sampler"
        )


def given_ids(objective: Objective, teacher: TeacherSource | Scoring) -> None:
    """Refuse a support that the student chooses beside a teacher that scores only its own top ids."""
    if objective.needs.student_top and not getattr(teacher, "scores_given_ids", True):
        raise ConfigError(
            f"`support` must be the teacher's own top ids for {type(teacher).__name__}, which cannot score given "
            f"ids, got {type(objective.support).__name__}; use support=teacher, or a teacher in this process"
        )


def hidden(objective: Objective, teacher: TeacherSource) -> None:
    """Refuse a divergence over the whole vocabulary from a teacher that sends no hidden states."""
    needs = objective.needs
    read = needs.full or any(term.target == "teacher" for term in needs.collected_full)
    if read and not getattr(teacher, "gives_hidden", True):
        raise ConfigError(
            "`support` must be selected ids with a served, cached, routed or sharded teacher "
            f"({type(teacher).__name__}), which gives no hidden states to compare whole vocabularies with, got "
            f"{type(objective.support).__name__}; use support=teacher or support=student, or a teacher in this "
            "process without a cache or teacher.shard"
        )


def sharded(teacher: TeacherSource, rollout: RolloutSampler, collector: Sizes) -> None:
    """Refuse a sharded teacher whose processes would call it unequally often, and wait for each other forever."""
    if not getattr(teacher, "shard", False):
        return
    tokens = collector.score_tokens
    condition = "be null with teacher.shard=true: processes would differ in their number of forwards"
    require(tokens is None, "collector.score_tokens", condition, tokens, "use collector.score_rows")
    both = sorted(rollout.writers & {"teacher", "mixed"})
    condition = "be without a part for the teacher's model with teacher.shard=true, which scores alone"
    remedy = "use rollout=top_p, or teacher.offload=cpu in place of teacher.shard"
    require(not both, "rollout", condition, type(rollout).__name__, remedy)


def changing(objective: Objective, teacher: Scoring, rollout: RolloutSampler, collector: Sizes) -> None:
    """Refuse a teacher that changes, or that has a prompt of its own, where another one is read."""
    steps = collector.steps_per_collection
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
