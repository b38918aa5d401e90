"""The immutable values that flow through a training step; see the modules for what each holds."""

from opd_lightning.types.experience import Candidates, Experience, Graded, Scores, TokenLoss
from opd_lightning.types.requests import FullTerm, Needs, SupportForm, Want
from opd_lightning.types.sampling import Sampling
from opd_lightning.types.values import (
    Finish,
    Generation,
    Origin,
    Problem,
    PromptBatch,
    Rollout,
    TensorValue,
    TokenBatch,
)

__all__ = [
    "Candidates",
    "Experience",
    "Finish",
    "FullTerm",
    "Generation",
    "Graded",
    "Needs",
    "Origin",
    "Problem",
    "PromptBatch",
    "Rollout",
    "Sampling",
    "Scores",
    "SupportForm",
    "TensorValue",
    "TokenBatch",
    "TokenLoss",
    "Want",
]
