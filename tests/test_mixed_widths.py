"""Two models of one tokenizer with padded heads of different widths: all is as if both had the shared ids alone."""

from __future__ import annotations

import pytest
import torch
from test_scorer import dense
from tiny import random_rollout, tiny_model

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.loading import FrozenScorer
from opd_lightning.objective import Objective
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.scorer import Scorer
from opd_lightning.scoring import ScoringPass
from opd_lightning.support.full import Full
from opd_lightning.support.none import NoSupport
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.world import World

SHARED = 40
K = 4


def renormalised(student, teacher, by):
    """KL(S||T) over the K best ids of ``by``."""
    ids = by.topk(K, -1).indices
    s, t = (logp.gather(-1, ids).log_softmax(-1) for logp in (student, teacher))
    return (s.exp() * (s - t)).sum(-1)


def with_tail(student, teacher):
    ids = teacher.topk(K, -1).indices
    rows = (logp.gather(-1, ids).exp() for logp in (student, teacher))
    s, t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in rows)
    return (s * (s / t).log()).sum(-1)


def topk(form="renormalised"):
    return TopK(divergence=ReverseKL(), form=form)


# Each estimator and support, and its loss per token from log-probs [batch time SHARED].
CASES = {
    "token": (Token(reward=LogRatio()), NoSupport(), None),
    "full": (topk(), Full(), lambda s, t: (s.exp() * (s - t)).sum(-1)),
    "teacher": (topk(), TeacherTopK(k=K), lambda s, t: renormalised(s, t, t)),
    "student": (topk(), StudentTopK(k=K), lambda s, t: renormalised(s, t, s.detach())),
    "tail": (topk("tail"), TeacherTopK(k=K), with_tail),
}


def ours(student, teacher, objective, rollout):
    """The loss of a step from what the two scorers collect."""
    frozen = FrozenScorer(teacher)
    with torch.no_grad():
        scoring = ScoringPass(teacher=frozen, reference=None, objective=objective, rows=4)
        experience = objective.finish(scoring(student, rollout), World())
    assert experience.support_ids is None or experience.support_ids.max() < SHARED
    student.set_target("teacher", teacher)
    hidden = {} if experience.teacher_hidden is None else {"teacher": experience.teacher_hidden}
    scores = student(rollout.tokens, objective.want, experience.support_ids, hidden)
    return objective.loss(scores, experience, 0.0)[0]


# numerics 11.25
@pytest.mark.parametrize("widths", [(SHARED, 48), (48, SHARED), (44, 48)], ids=lambda w: f"{w[0]}-{w[1]}")
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_shared_ids(case, widths):
    """Both cut before the softmax and before the top k, though the padding rows are the most likely ones."""
    models = [tiny_model(n, vocab=width, tied=False).double().eval() for n, width in enumerate(widths)]
    with torch.no_grad():
        for model in models:
            model.get_output_embeddings().weight[SHARED:] *= 20.0
    rollout = random_rollout(4, vocab=SHARED)
    estimator, support, by_hand = CASES[case]
    objective = Objective(estimator=estimator, support=support, reduction=TokenMean())
    loss = ours(*(Scorer(model, SHARED) for model in models), objective, rollout)

    s, t = (dense(model, rollout, SHARED).double() for model in models)
    t = t.detach()
    own, taught = (logp.gather(-1, rollout.ids.unsqueeze(-1)).squeeze(-1) for logp in (s, t))
    each = -(taught - own.detach()) * own if by_hand is None else by_hand(s, t)
    expected = each[rollout.mask].mean()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    head = models[0].get_output_embeddings().weight
    parameters = [head, *(p for p in models[0].parameters() if p is not head)]
    found, wanted = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    assert not found[0][SHARED:].any()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, b.abs().max().item()), rtol=1e-4)
