"""What a model says of itself without its weights: configuration, tokenizer, and what ends a response."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.loading import Limits, SharesVocabulary, TeacherSource
from opd_lightning.models import configured_stops, load_config, load_tokenizer
from opd_lightning.paths import model_path


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model of this process, ``field`` names it in errors.

    Args:
        stops: ids that end a response.
    """

    path: str
    field: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[int, ...]

    @property
    def width(self) -> int:
        """Of its logits."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """Most tokens of a row that it was made for; None where it does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def read(cls, path: str, field: str, trust: bool) -> ModelFacts:
        """Return what lies at ``path``.

        Raises:
            ConfigError: no configuration or tokenizer of a causal language model.
        """
        config, tokenizer = load_config(path, field, trust), load_tokenizer(path, field, trust)
        try:
            generation = GenerationConfig.from_pretrained(model_path(path))
        except OSError:  # the model then makes its own
            generation = GenerationConfig.from_model_config(config)
        stops = configured_stops(generation, tokenizer)
        return cls(path=path, field=field, config=config, tokenizer=tokenizer, stops=stops)


def student_facts(student_path: str, trust_remote_code: bool) -> ModelFacts:
    """Return the student's."""
    return ModelFacts.read(student_path, "student.path", trust_remote_code)


def teacher_facts(teacher: TeacherSource, student_path: str, trust_remote_code: bool) -> ModelFacts | None:
    """Return the teacher's, None for one that compares tokenizers itself, elsewhere."""
    if isinstance(teacher, SharesVocabulary):
        return None
    own = trust_remote_code and teacher.path == student_path
    trust = bool(getattr(teacher, "trust_remote_code", own))
    return ModelFacts.read(teacher.path, "teacher.path", trust)


def teacher_limits(teacher: TeacherSource) -> Limits | None:
    """Return what a teacher's server can take, None for a teacher without one; it must answer."""
    limits = getattr(teacher, "limits", None)
    return None if limits is None else limits()
