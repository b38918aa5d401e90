"""Every combination that numerics.md, section 10, refuses: one sentence with the remedy. numerics 11.30

Its items are numbered in the order in which they stand there.
"""

import re
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from tiny import random_rollout, tiny_model

from opd_lightning.checks.parts import given_ids
from opd_lightning.divergence.forward_kl import ForwardKL
from opd_lightning.divergence.generalised_reverse_kl import GeneralisedReverseKL
from opd_lightning.divergence.jsd import JSD
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.divergence.skewed import Skewed
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.discounted import Discounted
from opd_lightning.estimator.penalty import SampledPenalty
from opd_lightning.estimator.sequence import Sequence
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.loading import FrozenScorer, Loading
from opd_lightning.models import load_tokenizer
from opd_lightning.objective import Objective
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.regularizer.ratio_clip import RatioClip
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.scorer import Scorer
from opd_lightning.scoring import ScoringPass
from opd_lightning.support.augmented import Augmented
from opd_lightning.support.full import Full
from opd_lightning.support.sampled import Sampled
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.support.union import Union
from opd_lightning.types import Origin

FORM = re.compile(r"`[\w.]+` must .+, got .+; (use|add|leave|choose|cut) .+")


def refused(build, *parts):
    with pytest.raises(ConfigError) as caught:
        build()
    sentence = str(caught.value)
    assert FORM.fullmatch(sentence), sentence  # no line break
    assert not re.search(r"[.!?] +[A-Z`]|[.!?]$", sentence), sentence  # one sentence
    for part in parts:
        assert part in sentence, sentence


def objective(estimator, support, **parts):
    return Objective(estimator=estimator, support=support, reduction=TokenMean(), **parts)


TOKEN, TOPK = Token(reward=LogRatio()), TopK(divergence=ReverseKL())


# numerics 10.1, 11.30
def test_k1_direct():
    refused(
        lambda: Token(reward=LogRatio(), gradient="direct"),
        "estimator.gradient",
        "exactly 0",
        "estimator=topk",
    )
    refused(
        lambda: SampledPenalty(kind="k1", of="reverse_kl"), "estimator.kind", "exactly 0", "estimator=token"
    )


# numerics 10.2, 11.30
@pytest.mark.parametrize("kind", [Token, Sequence, partial(Discounted, gamma=1.0)])
@pytest.mark.parametrize("origins", [("teacher",), ("data",), ("student", "teacher")])
def test_k1_as_advantage_on_the_teacher_s_tokens(origins, kind):
    parts = ("estimator.origins", "opposite to imitation", "regularizer=[imitation]")
    refused(lambda: kind(reward=LogRatio(), origins=origins), *parts)


# numerics 10.2
@pytest.mark.parametrize("seed", range(5))
def test_why_k1_as_advantage_on_the_teacher_s_tokens_is_refused(seed):
    """y ~ T: A = r has neither KL's gradient, and A = -r, the k1 of KL(T||S), is ascent away from imitation."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, generator=draw, dtype=torch.float64).requires_grad_()
    t = torch.randn(8, generator=draw, dtype=torch.float64).softmax(-1)
    s = logits.softmax(-1)
    ratio = (t / s).log()

    def ascent(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    toward = {"reverse": ascent((s * ratio).sum()), "forward": ascent(-(t * ratio).sum())}
    rewarded = ascent((t * ratio.detach() * s.log()).sum())
    for exact in toward.values():
        assert (rewarded - exact).norm() > 0.1 * exact.norm()
    punished = ascent((t * -ratio.detach() * s.log()).sum())
    assert torch.cosine_similarity(punished, toward["forward"], dim=0) < -0.5


# numerics 10.3, 11.30
def test_a_value_of_the_position_as_advantage():
    parts = ("estimator.gradient", "depends on the position only", "exactly 0", "estimator=token")
    refused(lambda: TopK(divergence=ReverseKL(), gradient="score"), *parts)


# numerics 10.3, 11.8
def test_why_a_value_of_the_position_as_advantage_is_refused(world):
    estimator = TopK(divergence=ReverseKL(), form="tail")
    divergence = estimator(*world.on_support(TeacherTopK(k=2)), 0.0).value.detach()
    assert divergence.max() > 0.1
    loss = replace(TOKEN(world.scores, world.experience, 0.0), value=divergence * world.scores.taken_logp)
    got = world.expected_gradient(loss)
    torch.testing.assert_close(got, torch.zeros_like(got), atol=1e-12, rtol=0)


# numerics 10.4, 11.30
@pytest.mark.parametrize(
    "support", [TeacherTopK(k=1), StudentTopK(k=1), Sampled()], ids=lambda s: type(s).__name__
)
def test_renormalised_on_one_token(support):
    refused(lambda: objective(TOPK, support), "`support`", "at least 2", "got 1", "support.k=16")
    assert objective(TOPK, Augmented(k=1))
    assert objective(TOPK, Union(k=1))


RAW = {
    "reverse_kl": ReverseKL(),
    "jsd": JSD(beta=0.5),
    "skewed": Skewed(alpha=0.1, direction="reverse"),
}


# numerics 10.5, 11.30
@pytest.mark.parametrize("divergence", RAW.values(), ids=RAW.keys())
def test_a_raw_truncated_divergence_that_is_not_named(divergence):
    parts = ("estimator.form", type(divergence).__name__, "'plain'", "estimator.biased=true")
    refused(lambda: TopK(divergence=divergence, form="plain"), *parts)
    origins = {"origins": ("student", "teacher"), "other_divergence": divergence}
    refused(lambda: TopK(divergence=ForwardKL(), form="plain", **origins), *parts)
    assert TopK(divergence=divergence, form="plain", biased=True)


def test_generalised_and_forward_kl_hold_on_a_truncated_support():
    assert TopK(divergence=GeneralisedReverseKL(), form="plain")
    assert TopK(divergence=ForwardKL(), form="plain")


# numerics 10.6, 11.30
@pytest.mark.parametrize(
    ("kind", "of", "right"),
    [
        ("k3", "reverse_kl", "forward_kl"),
        ("k2", "forward_kl", "reverse_kl"),
        ("absolute", "reverse_kl", "none"),
    ],
)
def test_a_penalty_labelled_as_another_divergence(kind, of, right):
    refused(
        lambda: SampledPenalty(kind=kind, of=of),
        "estimator.of",
        f"be {right} for {kind}",
        f"use estimator.of={right}",
    )


# numerics 10.7, 11.30
def test_taken_or_not_taken_labelled_as_reverse_kl():
    tail = TopK(divergence=ReverseKL(), form="tail")
    refused(lambda: objective(tail, Sampled()), "`support`", "at least 2", "got 1", "estimator.biased=true")
    assert objective(replace(tail, biased=True), Sampled())
    assert objective(tail, TeacherTopK(k=2))


# numerics 10.8, 11.30
def test_the_ratio_of_ppo_beside_a_direct_gradient():
    clip = {"ratio_clip": RatioClip()}
    for direct in (TOPK, SampledPenalty(kind="k2", of="reverse_kl")):
        parts = (
            "`estimator`",
            "advantages for regularizer ratio_clip",
            type(direct).__name__,
            "estimator=token",
        )
        refused(lambda direct=direct: objective(direct, TeacherTopK(k=2), regularizers=clip), *parts)
    assert objective(TOKEN, TeacherTopK(k=2), regularizers=clip)


def test_a_baseline_on_a_support_that_follows_the_taken_token():
    based = Token(reward=LogRatio(), baseline="reverse_kl")
    for support in (Augmented(k=4), Sampled()):
        parts = ("`support`", "taken token", type(support).__name__, "support=full")
        refused(lambda support=support: objective(based, support), *parts)
    assert objective(based, Full())
    assert objective(based, StudentTopK(k=4))


# -- between the models

WIDTH = 24


class TopOnly(FrozenScorer):
    """A teacher that is served: its own top log-probs and nothing else."""

    scores_given_ids: ClassVar[bool] = False


# numerics 10.11, 11.30
def test_a_student_s_support_with_a_teacher_that_cannot_score_given_ids():
    served = TopOnly(Scorer(tiny_model(vocab=WIDTH)))
    for support in (StudentTopK(k=4), Union(k=4)):
        chosen = objective(TOPK, support)
        parts = ("`support`", "cannot score given ids", type(support).__name__, "support=teacher")
        refused(lambda chosen=chosen: given_ids(chosen, served), *parts)
    given_ids(objective(TOPK, TeacherTopK(k=4)), served)


# numerics 10.10, 11.30
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_teacher_at_another_temperature(temperature):
    loading = Loading(
        student=Scorer(tiny_model(vocab=WIDTH)),
        student_path="here",
        student_dtype="float32",
        tokenizer=load_tokenizer("builtin:word_problems/student", "student.path"),
        vocab=WIDTH,
        scratch_mb=1,
        temperature=1.0,
    )
    field = "teacher.scoring_temperature"
    parts = (field, "student.scoring_temperature=1.0", f"got {temperature}")
    refused(lambda: loading.check_temperature(temperature, field), *parts)
    loading.check_temperature(1.0, field)
    loading.check_temperature(None, field)


# numerics 10.9, 11.30
def test_a_teacher_s_top_ids_beyond_the_student_s_width():
    """A teacher with 8 more ids than the student, not cut to the shared ones, and sure of the last of them."""
    rollout = random_rollout(3, vocab=WIDTH)
    student = Scorer(tiny_model(1, vocab=WIDTH)).eval()
    model = tiny_model(2, vocab=WIDTH + 8, tied=False).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[WIDTH:] *= 20.0
    chosen = objective(TOPK, TeacherTopK(k=4))

    def score(vocab):
        scoring = ScoringPass(
            teacher=FrozenScorer(Scorer(model, vocab)), reference=None, objective=chosen, rows=2
        )
        with torch.no_grad():
            return scoring(student, rollout)

    refused(lambda: score(None), "`support`", f"below the student's {WIDTH}", "shared vocabulary")
    assert score(WIDTH).support_ids.max() < WIDTH
    assert (rollout.origin == Origin.STUDENT).all()
