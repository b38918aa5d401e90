"""A reference of its own: any frozen model with the student's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from opd_lightning.errors import require
from opd_lightning.loading import FrozenScorer, Loading
from opd_lightning.models import load_tokenizer, shared_vocabulary, vocabulary_width


@dataclass(frozen=True, kw_only=True)
class Path:
    """Another model as the reference R, for example what the teacher was before its own training.

    Args:
        path: folder or hub name.
        dtype: torch dtype of the weights.
        trust_remote_code: whether Python code that comes with the checkpoint may run.
    """

    path: str | None
    dtype: str
    trust_remote_code: bool = False

    def load(self, loading: Loading) -> FrozenScorer:
        """Load the model, frozen and in evaluation mode.

        Raises:
            ConfigError: no path; another tokenizer than the student's, or a narrower vocabulary than the one
                that student and teacher share; nothing that can be loaded lies there.
        """
        field = "reference.path"
        require(self.path is not None, field, "name a model", self.path, "add reference.path=…")
        assert self.path is not None
        widths = (loading.vocab, vocabulary_width(self.path, field, self.trust_remote_code))
        tokenizer = load_tokenizer(self.path, field, self.trust_remote_code)
        shared = shared_vocabulary(loading.tokenizer, tokenizer, widths, field)
        require(
            shared == loading.vocab,
            field,
            f"cover the {loading.vocab} ids that student and teacher share",
            shared,
            "choose a reference of the teacher's width",
        )
        return FrozenScorer(loading.frozen(self.path, field, self.dtype, self.trust_remote_code))
