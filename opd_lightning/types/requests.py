"""What the parts of a method ask for: of one scorer pass, and of a whole collection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from opd_lightning.types.values import Origin

SupportForm = Literal["none", "renormalised", "exact"]


@dataclass(frozen=True)
class FullTerm:
    """A divergence of the student from another model over the whole vocabulary, computed inside the head.

    ``divergence(student_logp, target_logp)`` reduces the last axis; equal terms are computed once.
    """

    target: Literal["teacher", "reference"]
    divergence: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Want:
    """What a scorer is asked for, at every response position.

    ``taken``: log-prob of the response token. ``support``: log-probs at given ids, ``"renormalised"``
    over those ids alone (no normaliser over the vocabulary is computed) or ``"exact"``. ``entropy`` of
    the full distribution, nats. ``top``: its own top ids and their exact log-probs. ``hidden``: the
    last hidden states themselves. ``full``: divergences over the whole vocabulary from models given by
    their hidden states. A part that compares on the support names the full term that takes its place
    when the support is the whole vocabulary; the objective keeps one of the two.
    """

    taken: bool = False
    support: SupportForm = "none"
    entropy: bool = False
    top: int = 0
    hidden: bool = False
    full: frozenset[FullTerm] = frozenset()

    def __or__(self, other: Want) -> Want:
        """Return what serves both requests; exact log-probs serve a renormalised request too."""
        forms: tuple[SupportForm, ...] = ("none", "renormalised", "exact")
        return Want(
            taken=self.taken or other.taken,
            support=max(self.support, other.support, key=forms.index),
            entropy=self.entropy or other.entropy,
            top=max(self.top, other.top),
            hidden=self.hidden or other.hidden,
            full=self.full | other.full,
        )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a part needs to have been collected; the collector serves the union with one pass a model.

    ``support``: that a support is selected. ``full``: that it is the whole vocabulary or a selection.
    ``least_support``: the fewest tokens that a support may hold. ``fixed_support``: that it may not depend
    on the taken token (it has ``follows_taken`` if it does). ``teacher_top``, ``student_top``: top
    ids of that model. ``teaches``: whose tokens the part puts into the loss. ``advantage``: an estimator
    that has advantages (a score-function one).

    Of the student as it was when the responses were scored, just before their first optimizer step:
    ``collected_logp`` of the taken token, untruncated; ``collected_entropy``, nats; ``collected_full``,
    divergences over the whole vocabulary. With ``engine.ahead=1`` older weights wrote the responses, and
    ``behavior_logp`` stays theirs, so that ``collected_logp - behavior_logp`` holds the staleness too. Of the
    frozen reference: ``reference_taken``, ``reference_support`` log-probs, ``reference_hidden`` states.
    """

    support: bool = False
    least_support: int = 0
    fixed_support: bool = False
    full: bool = False
    teacher_top: int = 0
    student_top: int = 0
    teacher_taken: bool = False
    teacher_entropy: bool = False
    collected_logp: bool = False
    collected_entropy: bool = False
    collected_full: frozenset[FullTerm] = frozenset()
    reference_taken: bool = False
    reference_support: bool = False
    reference_hidden: bool = False
    advantage: bool = False
    teaches: frozenset[Origin] = frozenset({Origin.STUDENT})

    @property
    def reference(self) -> bool:
        """Whether a reference model has to be loaded."""
        terms = any(term.target == "reference" for term in self.collected_full)
        return self.reference_taken or self.reference_support or self.reference_hidden or terms

    def __or__(self, other: Needs) -> Needs:
        """Return what serves both."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Needs(**{name: a | b if isinstance(a, frozenset) else max(a, b) for name, a, b in pairs})
