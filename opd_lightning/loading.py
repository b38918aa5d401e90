"""Frozen models beside the student: what they are loaded with, and how they score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from opd_lightning.errors import require
from opd_lightning.layers import compile_layers, evaluating
from opd_lightning.layout import check_packed
from opd_lightning.models import load_model, load_tokenizer, shared_vocabulary, vocabulary_width
from opd_lightning.protocols import Rests, Scoring
from opd_lightning.scorer import Scorer, check_head
from opd_lightning.types import Problem, PromptBatch, Scores, TokenBatch, Want


@dataclass(frozen=True)
class FrozenScorer:
    """A scorer without gradient. Not an ``nn.Module``: it never becomes part of the trained module.

    ``view`` turns the student's prompts into this model's own, where it sees another one.
    """

    scorer: Scorer
    view: Callable[[PromptBatch], PromptBatch] | None = None

    @torch.no_grad()
    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Score the tokens; see :class:`~opd_lightning.scorer.Scorer`."""
        return self.scorer(tokens, want, support_ids)

    def to(self, device: torch.device | str) -> FrozenScorer:
        """Move the weights to ``device``, in place."""
        self.scorer.to(device)
        return self

    def awake(self) -> AbstractContextManager[None]:
        """Have the weights where they work inside the block, for whoever uses the model itself."""
        return nullcontext()

    def keep_head(self) -> None:
        """Have the head stay where gradients flow, where it would not."""


@dataclass(frozen=True)
class SharedScorer(FrozenScorer):
    """The student itself, scoring without gradient and without dropout. No copy: the trainer moves the weights."""

    def __call__(
        self, tokens: TokenBatch, want: Want, support_ids: Int[Tensor, "batch time k"] | None = None
    ) -> Scores:
        """Score the tokens with the student's weights as they are now."""
        with evaluating(self.scorer):
            return super().__call__(tokens, want, support_ids)

    def to(self, device: torch.device | str) -> SharedScorer:
        """Leave the weights where the trainer has them."""
        return self


def check_scratch(scratch_mb: object, field: str = "student.head_scratch_mb") -> None:
    """Raise ConfigError unless ``field`` is a size."""
    size = isinstance(scratch_mb, int | float) and not isinstance(scratch_mb, bool) and scratch_mb > 0
    require(size, field, "be a number of MB above 0", scratch_mb, "use 256")


def same_temperature(temperature: float | None, student: float, field: str) -> None:
    """Refuse to score at another ``temperature`` than the ``student``; None is the student's."""
    require(
        temperature is None or temperature == student,
        field,
        f"equal student.scoring_temperature={student} (probabilities at two temperatures differ even "
        "between equal models)",
        temperature,
        "leave it null",
    )


def load_scorer(
    path: str,
    field: str,
    dtype: str,
    vocab: int,
    scratch_mb: float,
    temperature: float,
    layout: str,
    compiled: bool = False,
    change: Callable[[PreTrainedModel], None] | None = None,
    trust: bool = False,
    quantization: QuantizationConfigMixin | None = None,
) -> Scorer:
    """Load the model at ``path`` behind a scorer whose head is known to be read rightly.

    Args:
        field: what names the path, for errors.
        dtype: torch dtype of the weights.
        vocab: ids that are scored.
        scratch_mb: logits of every model that may be alive at once, in MB.
        temperature: scoring temperature.
        layout: how rows go through the backbone.
        compiled: whether torch.compile runs its layers.
        change: what is done to the model first, adapters for instance.
        trust: whether code that comes with the model may run.
        quantization: how its weights are quantised, None for not at all.

    Raises:
        ConfigError: nothing that can be loaded lies at ``path``, or its head or the layout is not supported.
    """
    model = load_model(path, field, dtype, trust, quantization)
    if change is not None:
        change(model)
    check_packed(model, layout, path)
    scorer = Scorer(model, vocab, int(scratch_mb * 2**20), temperature, layout)
    check_head(scorer, path)
    if compiled:
        compile_layers(model)
    return scorer


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The run that a model is loaded for: the student, the shared vocabulary, and how the head is read.

    Args:
        student: the trained scorer, with its starting weights.
        student_path: where they came from; ``student_dtype`` as what.
        tokenizer: the student's.
        vocab: ids that both models know.
        scratch_mb: logits of every model that may be alive at once, in MB.
        temperature: scoring temperature of every model.
        layout: how rows go through each backbone.
        compiled: whether torch.compile runs their layers.
        max_prompt_tokens: longest prompt.
        problems: those that will be trained on, where they are known beforehand.
        trusted: whether code that comes with the student may run.
    """

    student: Scorer
    student_path: str
    student_dtype: str
    tokenizer: PreTrainedTokenizerBase
    vocab: int
    scratch_mb: float
    temperature: float = 1.0
    layout: str = "auto"
    compiled: bool = False
    max_prompt_tokens: int = 512
    problems: Sequence[Problem] = ()
    trusted: bool = False

    def check_temperature(self, temperature: float | None, field: str) -> None:
        """Refuse a model that would be scored at another temperature than the student; None is the student's."""
        same_temperature(temperature, self.temperature, field)

    def frozen(
        self,
        path: str,
        field: str,
        dtype: str,
        trust: bool | None = None,
        quantization: QuantizationConfigMixin | None = None,
    ) -> Scorer:
        """Load the model at ``path``, frozen and in evaluation mode; ``field`` names it in errors.

        ``trust`` is whether code that comes with it may run; None for the student's own answer, for its own path
        alone. ``quantization`` is of its weights.

        Raises:
            ConfigError: nothing that can be loaded lies at ``path``, or its head is not supported.
        """
        read = (self.vocab, self.scratch_mb, self.temperature, self.layout, self.compiled)
        trusted = (self.trusted and path == self.student_path) if trust is None else trust
        scorer = load_scorer(path, field, dtype, *read, trust=trusted, quantization=quantization)
        return scorer.eval().requires_grad_(False)


@runtime_checkable
class TeacherSource(Protocol):
    """What names a teacher and loads it."""

    @property
    def path(self) -> str:
        """Where its tokenizer lies."""
        ...

    @property
    def dtype(self) -> str:
        """Torch dtype of its weights."""
        ...

    def load(self, loading: Loading) -> Scoring:
        """Return the teacher, a :class:`FrozenScorer` where its weights are in this process."""
        ...


@runtime_checkable
class SharesVocabulary(Protocol):
    """A teacher elsewhere, which compares tokenizers itself."""

    def shared_vocabulary(self, tokenizer: PreTrainedTokenizerBase, width: int) -> int:
        """Return how many ids it shares with a student of this tokenizer and width of logits, or refuse it."""
        ...


@runtime_checkable
class ReadsProblems(Protocol):
    """A teacher that not every problem suits."""

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Refuse problems that will be trained on, some of them where they are made on the way."""
        ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a teacher's server takes.

    Args:
        tokens: most tokens of a row, prompt and response.
        ids: most ids scored at one position; None where it does not say.
        flag: what raises them, to be followed by a number.
    """

    tokens: int
    ids: int | None
    flag: str = "max_ids="


def paired(
    student_path: str, teacher: TeacherSource, trust: bool = False
) -> tuple[PreTrainedTokenizerBase, int]:
    """Return the student's tokenizer, and how many ids student and teacher share; no weights are read.

    ``trust``: whether code that comes with the student may run; a teacher has its own ``trust_remote_code``.

    Raises:
        ConfigError: a folder is no model, or the tokenizers differ.
    """
    tokenizer = load_tokenizer(student_path, "student.path", trust)
    width = vocabulary_width(student_path, "student.path", trust)
    return tokenizer, shared_width(tokenizer, width, teacher, trust and teacher.path == student_path)


def shared_width(
    tokenizer: PreTrainedTokenizerBase, width: int, teacher: TeacherSource, trust: bool = False
) -> int:
    """Return how many ids a teacher shares with a student of this tokenizer and width of logits.

    ``trust``: whether code that comes with a teacher may run that has no ``trust_remote_code`` of its own.

    Raises:
        ConfigError: its folder is no model, or the tokenizers differ.
    """
    if isinstance(teacher, SharesVocabulary):
        return teacher.shared_vocabulary(tokenizer, width)
    named = teacher.path, "teacher.path", bool(getattr(teacher, "trust_remote_code", trust))
    return shared_vocabulary(tokenizer, load_tokenizer(*named), (width, vocabulary_width(*named)))


def scorers_of(model: Scoring | None) -> tuple[Scorer, ...]:
    """Return the models in this process that a teacher or reference scores with, none of one elsewhere."""
    if isinstance(model, FrozenScorer):
        return (model.scorer,)
    return tuple(getattr(model, "scorers", ()))


def holding(model: Scoring) -> AbstractContextManager[None]:
    """Have weights that come for a score stay until the block ends."""
    return model.holding() if isinstance(model, Rests) else nullcontext()


@runtime_checkable
class Reference(Protocol):
    """Where the reference policy comes from."""

    def load(self, loading: Loading) -> FrozenScorer:
        """Return the frozen reference."""
        ...
