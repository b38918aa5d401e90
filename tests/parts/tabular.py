"""A tabular world: every response of a tiny vocabulary, enumerated, in float64.

The student is a table of logits, one row for each prefix that a response can have; the teacher another.
Token 0 ends a response, and so does the last position. Expectations are sums over all responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.functional import divergence as forms
from opd_lightning.functional.head import Head, full
from opd_lightning.types import (
    Candidates,
    Experience,
    Finish,
    FullTerm,
    Origin,
    Problem,
    PromptBatch,
    Rollout,
    Scores,
    TokenLoss,
)

END = 0
Prefix = tuple[int, ...]


def make_rollout(ids: Tensor, mask: Tensor, **changed) -> Rollout:
    """A rollout of the student's own tokens, all inside the loss."""
    rows = len(ids)
    prompt = PromptBatch(
        ids=torch.zeros(rows, 1, dtype=torch.long),
        mask=torch.ones(rows, 1, dtype=torch.bool),
        problems=tuple(Problem(index=i, messages=()) for i in range(rows)),
        seeds=tuple(range(rows)),
    )
    values = {
        "prompt": prompt,
        "ids": ids,
        "mask": mask,
        "origin": torch.full_like(ids, Origin.STUDENT),
        "horizon": torch.ones_like(mask),
        "behavior_logp": torch.zeros(ids.shape),
        "finish": torch.full((rows,), Finish.EOS),
        "group": torch.arange(rows),
    }
    return Rollout(**(values | changed))


@dataclass
class World:
    """All responses of up to ``time`` tokens over ``vocab`` ids, under a tabular student and teacher."""

    vocab: int
    time: int
    seed: int = 0

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        self.prefixes = list(self._prefixes())
        self.index = {prefix: i for i, prefix in enumerate(self.prefixes)}
        shape = (len(self.prefixes), self.vocab)
        self.theta = torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
        self.teacher = torch.randn(shape, generator=draw, dtype=torch.float64) * 1.5
        self.responses = [(*p, v) for p in self.prefixes for v in range(self.vocab) if self._ends(p, v)]
        self.ids, self.mask, self.rows = self._pad()

    def _prefixes(self, prefix: Prefix = ()) -> Iterator[Prefix]:
        yield prefix
        if len(prefix) + 1 < self.time:
            for v in range(1, self.vocab):
                yield from self._prefixes((*prefix, v))

    def _ends(self, prefix: Prefix, v: int) -> bool:
        return v == END or len(prefix) + 1 == self.time

    def _pad(self) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.zeros(len(self.responses), self.time, dtype=torch.long)
        mask, rows = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
        for i, response in enumerate(self.responses):
            ids[i, : len(response)] = torch.tensor(response)
            mask[i, : len(response)] = True
            rows[i, : len(response)] = torch.tensor([self.index[response[:t]] for t in range(len(response))])
        return ids, mask, rows

    # What the models say.

    @property
    def student_logp(self) -> Tensor:
        """Log-probs ``[prefix vocab]``, with gradient."""
        return self.theta.log_softmax(-1)

    @property
    def teacher_logp(self) -> Tensor:
        return self.teacher.log_softmax(-1)

    def taken(self, logp: Tensor) -> Tensor:
        """Log-probs of the response tokens; padding holds a number that must not matter."""
        return logp[self.rows, self.ids].masked_fill(~self.mask, -7.0)

    @property
    def probability(self) -> Tensor:
        """Probability of each response under the student, with gradient."""
        return (self.taken(self.student_logp) * self.mask).sum(-1).exp()

    @property
    def visits(self) -> dict[Prefix, float]:
        """Probability of reaching each prefix, by recursion over prefixes and not over responses."""
        p = self.student_logp.detach().exp()
        reached = {(): 1.0}
        for prefix in self.prefixes[1:]:
            reached[prefix] = reached[prefix[:-1]] * p[self.index[prefix[:-1]], prefix[-1]].item()
        return reached

    # What a part sees.

    @property
    def rollout(self) -> Rollout:
        return make_rollout(self.ids, self.mask)

    @property
    def scores(self) -> Scores:
        return Scores(taken_logp=self.taken(self.student_logp))

    @property
    def experience(self) -> Experience:
        return Experience(
            rollout=self.rollout,
            share=torch.ones(self.ids.shape),
            teacher_taken_logp=self.taken(self.teacher_logp),
        )

    def on_support(self, support, *, renormalised: bool = False) -> tuple[Scores, Experience]:
        """Scores and experience on the ids that ``support`` selects from both models' tables."""
        candidates = Candidates(
            taken=self.ids,
            teacher_top=self.teacher.argsort(-1, descending=True)[self.rows],
            student_top=self.theta.detach().argsort(-1, descending=True)[self.rows],
        )
        ids, valid = support(candidates)
        student = self.student_logp[self.rows].gather(-1, ids)
        if renormalised:
            student = forms.renormalise(student, valid)
        teacher = self.teacher_logp[self.rows].gather(-1, ids)
        experience = replace(
            self.experience, support_ids=ids, support_valid=valid, support_teacher_logp=teacher
        )
        return replace(self.scores, support_logp=student), experience

    def on_everything(self, divergence) -> tuple[Scores, Experience]:
        """The same for the full support: hidden states are the tables' rows, the heads identities."""
        head = Head(weight=torch.eye(self.vocab, dtype=torch.float64))
        hidden, teacher_hidden = self.theta[self.rows], self.teacher[self.rows]
        value = full(hidden.flatten(0, 1), head, teacher_hidden.flatten(0, 1), head, divergence, scratch=896)
        scores = replace(self.scores, full={FullTerm("teacher", divergence): value.reshape(self.ids.shape)})
        return scores, replace(self.experience, teacher_hidden=teacher_hidden)

    # Truth.

    def gradient(self, loss: Tensor) -> Tensor:
        """Gradient of a scalar with respect to the student's table."""
        return torch.autograd.grad(loss, self.theta)[0]

    def expected_gradient(self, loss: TokenLoss, share: Tensor | float = 1.0) -> Tensor:
        """Gradient of a part's loss, each response weighted with its probability, each token with 1."""
        weight = self.probability.detach().unsqueeze(-1) * self.mask * share
        return self.gradient((weight * loss.weight * loss.value).sum())

    def sequence_reverse_kl(self) -> Tensor:
        """Sum over responses of S(y) (log S(y) - log T(y)), differentiated through everything."""
        student = (self.taken(self.student_logp) * self.mask).sum(-1)
        teacher = (self.taken(self.teacher_logp) * self.mask).sum(-1)
        return (self.probability * (student - teacher)).sum()

    def score_sum(self, credit: Callable[[list[float], int], float]) -> Tensor:
        """E sum_t credit(d, t) s_t by loops, with s_t = onehot(y_t) - S written by hand.

        ``d`` are the costs log S - log T of the response's tokens. No autograd takes part.
        """
        s, t = self.student_logp.detach(), self.teacher_logp
        total = torch.zeros_like(s)
        for response in self.responses:
            at = [self.index[response[:i]] for i in range(len(response))]
            probability = torch.stack([s[i, y] for i, y in zip(at, response, strict=True)]).sum().exp()
            costs = [(s[i, y] - t[i, y]).item() for i, y in zip(at, response, strict=True)]
            for position, (i, y) in enumerate(zip(at, response, strict=True)):
                score = -s[i].exp()
                score[y] += 1.0
                total[i] += probability * credit(costs, position) * score
        return total


def with_reference(world: World, table: Tensor, support=None) -> tuple[Scores, Experience]:
    """Scores and experience that also hold a reference given by its logits, in every form."""
    term = FullTerm("reference", forms.reverse_kl)
    scores, experience = (world.scores, world.experience) if support is None else world.on_support(support)
    reference = table.log_softmax(-1)
    head = Head(weight=torch.eye(world.vocab, dtype=torch.float64))
    hidden, other = world.theta[world.rows], table[world.rows]
    value = full(hidden.flatten(0, 1), head, other.flatten(0, 1), head, term.divergence, scratch=896)
    on_ids = None if support is None else reference[world.rows].gather(-1, experience.support_ids)
    experience = replace(
        experience,
        reference_taken_logp=world.taken(reference),
        reference_hidden=other,
        reference_support_logp=on_ids,
    )
    return replace(scores, full={term: value.reshape(world.ids.shape)}), experience


def stale(world: World, seed: int = 5, size: float = 0.5) -> Tensor:
    """Logits of another student, some way off."""
    random = torch.Generator().manual_seed(seed)
    return world.theta.detach() + size * torch.randn(world.theta.shape, generator=random, dtype=torch.float64)


def collected(world: World, table: Tensor) -> Experience:
    """The world's experience, with the student at collection given by its logits."""
    return replace(world.experience, collected_logp=world.taken(table.log_softmax(-1)))
