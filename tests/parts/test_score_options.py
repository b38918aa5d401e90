"""Baselines, normalised advantages and the single-step term: what they change, and what they must not."""

from dataclasses import replace

import pytest
import torch
from tabular import make_rollout
from tiny import random_experience, tiny_model

from opd_lightning.buffer import micro_batches
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.discounted import Discounted
from opd_lightning.estimator.sequence import Sequence
from opd_lightning.estimator.token import Token
from opd_lightning.estimator.topk import TopK
from opd_lightning.functional.divergence import reverse_kl
from opd_lightning.objective import Objective
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.regularizer.step_kl import StepKL
from opd_lightning.reward.floor import Floor
from opd_lightning.reward.log_ratio import LogRatio
from opd_lightning.schedule import Linear
from opd_lightning.scorer import Scorer
from opd_lightning.support.none import NoSupport
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.types import Experience, Needs, Scores, Want
from opd_lightning.world import World as Processes

R = LogRatio()
EVERY = {"token": Token, "discounted": lambda **k: Discounted(gamma=0.7, **k), "sequence": Sequence}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def visits(world):
    return torch.tensor([world.visits[p] for p in world.prefixes], dtype=torch.float64)


def reverse(world):
    s, t = world.student_logp.exp(), world.teacher_logp.exp()
    return (visits(world) * (s * (s / t).log()).sum(-1)).sum()


# -- baseline: numerics 11.14


def test_the_advantage_with_reverse_kl_has_mean_0_at_every_prefix(world):  # numerics 11.14
    scores, experience = world.on_everything(reverse_kl)
    loss = Token(reward=R, baseline="reverse_kl")(scores, experience, 0.0)
    assert not loss.advantage.requires_grad
    weight = world.probability.detach().unsqueeze(-1) * world.mask
    mean = torch.zeros(len(world.prefixes), dtype=torch.float64).index_add(
        0, world.rows.flatten(), (weight * loss.advantage).flatten()
    )
    close(mean, torch.zeros_like(mean), atol=1e-12)
    plain = Token(reward=R)(scores, experience, 0.0)
    assert (weight * loss.advantage.square()).sum() < (weight * plain.advantage.square()).sum()


@every
@pytest.mark.parametrize("reward", [R, Floor(floor=-0.5)], ids=["log_ratio", "floor"])
@pytest.mark.parametrize("whole", [True, False], ids=["full", "top-k"])
def test_a_baseline_changes_no_expected_gradient(world, make, reward, whole):  # numerics 11.14
    """Not with a truncated sum either, nor one of credit for later tokens."""

    def of(**options):
        given = world.on_everything(reverse_kl) if whole else world.on_support(TeacherTopK(k=2))
        loss = make(reward=reward, **options)(*given, 0.0)
        return loss, world.expected_gradient(loss)

    plain, expected = of()
    loss, got = of(baseline="reverse_kl")
    close(got, expected)
    assert (loss.advantage - plain.advantage)[world.mask].abs().max() > 1e-2


def test_the_truncated_baseline_is_the_plain_sum(world):
    scores, experience = world.on_support(TeacherTopK(k=2))
    loss = Token(reward=R, baseline="reverse_kl")(scores, experience, 0.0)
    plain = Token(reward=R)(scores, experience, 0.0)
    raw = TopK(divergence=ReverseKL(), form="plain", biased=True)(scores, experience, 0.0)
    close(loss.advantage, plain.advantage + raw.value.detach())


def test_what_a_baseline_needs():
    estimator = Token(reward=R, baseline="reverse_kl")
    assert estimator.needs == Needs(teacher_taken=True, support=True, least_support=1, fixed_support=True)
    assert estimator.want.support == "exact"
    assert [term.target for term in estimator.want.full] == ["teacher"]
    assert Token(reward=R).want == Want(taken=True)


# -- by length

STUDENT = torch.tensor([[-1.0, -2.0, -1.0, -4.0], [-1.0, -1.0, 0.0, 0.0]])
TEACHER = torch.tensor([[-2.0, -1.0, -3.0, -3.0], [-0.5, -2.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def given(**changed):
    rollout = make_rollout(torch.ones_like(MASK, dtype=torch.long), MASK, **changed)
    experience = Experience(
        rollout=rollout, share=MASK / 6, teacher_taken_logp=TEACHER, collected_logp=STUDENT
    )
    return Scores(taken_logp=STUDENT), experience


def test_a_return_by_its_length_to_go():
    """r = -1, 1, -2, 1 and .5, -1: rewards to go -1, 0, -1, 1 and -.5, -1 over 4, 3, 2, 1 and 2, 1 tokens."""
    loss = Discounted(reward=R, gamma=1.0, normalise="length")(*given(), 0.0)
    assert loss.advantage.tolist() == [[-0.25, 0.0, -0.5, 1.0], [-0.25, -1.0, 0.0, 0.0]]


def test_a_gap_restarts_the_length():
    """A token of someone else at position 1 of the first response: stretches of 1 and 2 tokens."""
    origin = torch.zeros(2, 4, dtype=torch.long)
    origin[0, 1] = 3
    loss = Discounted(reward=R, gamma=1.0, normalise="length")(*given(origin=origin), 0.0)
    assert loss.advantage.tolist() == [[-1.0, 0.0, -0.5, 1.0], [-0.25, -1.0, 0.0, 0.0]]


# -- whitening


def finished(estimator, experience, world=None):
    objective = Objective(estimator=estimator, support=NoSupport(), reduction=TokenMean())
    return objective.finish(experience, world or Processes())


@every
@pytest.mark.parametrize("normalise", ["whiten", "length_whiten"])
def test_whitened_advantages_have_mean_0_and_deviation_1(make, normalise):
    estimator = make(reward=R, normalise=normalise)
    scores, experience = given()
    loss = estimator(scores, finished(estimator, experience), 0.0)
    inside = loss.advantage[MASK]
    assert inside.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert inside.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert (loss.advantage[~MASK] == 0).all()
    plain = make(reward=R, normalise=normalise.removesuffix("_whiten").replace("whiten", "none"))
    expected = plain(scores, experience, 0.0).advantage[MASK]
    torch.testing.assert_close(inside, (expected - expected.mean()) / expected.std(unbiased=False))


def test_the_statistics_are_of_the_tokens_in_the_loss_at_collection():
    """A beyond-horizon token is in neither; a student that moved since changes A and not mean and deviation."""
    horizon = MASK.clone()
    horizon[0, 3] = False
    _, experience = given(horizon=horizon)
    estimator = Token(reward=R, normalise="whiten")
    experience = finished(estimator, experience)
    counted = torch.tensor([-1.0, 1.0, -2.0, 0.5, -1.0])
    mean, deviation = counted.mean(), counted.std(unbiased=False)
    torch.testing.assert_close(experience.extras["advantage_mean"], mean.expand(2, 4))
    torch.testing.assert_close(experience.extras["advantage_deviation"], deviation.expand(2, 4))
    loss = estimator(Scores(taken_logp=STUDENT - 1.0), experience, 0.0)
    torch.testing.assert_close(loss.advantage[0, 0], (0.0 - mean) / deviation)


def test_equal_advantages_whiten_to_0():
    experience = replace(given()[1], teacher_taken_logp=STUDENT + 0.25)
    estimator = Token(reward=R, normalise="whiten")
    loss = estimator(Scores(taken_logp=STUDENT), finished(estimator, experience), 0.0)
    assert loss.advantage.abs().max() == 0.0


def collected(rows):
    """Random experience with the tiny student's own log-probs at collection."""
    experience = random_experience(rows)
    with torch.no_grad():
        logp = Scorer(tiny_model())(experience.rollout.tokens, Want(taken=True)).taken_logp
    return replace(experience, collected_logp=logp)


def on_two_ranks(estimator, halves, answers):
    """Both ranks' experience and their sums, of which ``answers`` are already those of both together."""
    asked: list[list[torch.Tensor]] = [[], []]

    def finish(rank):
        def total(number):
            asked[rank].append(number.clone())
            at = len(asked[rank]) - 1
            return answers[at] if at < len(answers) else number

        return finished(estimator, halves[rank], Processes(rank=rank, size=2, total=total))

    parts = [finish(0), finish(1)]
    return parts, [a + b for a, b in zip(*asked, strict=True)]


@pytest.mark.parametrize("normalise", ["whiten", "length_whiten"])
def test_whitening_sees_all_ranks_and_no_micro_batch(normalise):  # numerics 11.23
    estimator = Discounted(reward=R, gamma=0.9, normalise=normalise)
    whole = collected(11)
    expected = finished(estimator, whole)
    halves = [whole.rows(slice(0, 4)), whole.rows(slice(4, 11))]
    # A later sum may depend on the answer to an earlier one: answer one more each time.
    answers: list[torch.Tensor] = []
    parts, sums = on_two_ranks(estimator, halves, answers)
    for known in range(len(sums)):
        answers.append(sums[known])
        parts, sums = on_two_ranks(estimator, halves, answers)
    for name, number in expected.extras.items():
        for part in (*parts, *micro_batches(expected, 3)):
            got = part.extras[name]
            torch.testing.assert_close(got, number[0, 0].expand_as(got), atol=1e-6, rtol=1e-6)
    assert expected.extras["advantage_deviation"].min() > 0.1


def test_whitening_needs_what_finish_prepares():
    estimator = Token(reward=R, normalise="whiten")
    assert estimator.needs == Needs(teacher_taken=True, collected_logp=True)
    with pytest.raises(ValueError, match=r"call Objective\.finish first"):
        estimator(*given(), 0.0)
    assert finished(Token(reward=R), given()[1]).extras == {}


def test_refusals():
    words = {"baseline": "value", "normalise": "batch"}
    for name, value in words.items():
        with pytest.raises(Exception, match=name):
            Token(reward=R, **{name: value})
    for normalise in ("whiten", "length_whiten"):
        with pytest.raises(
            ConfigError, match=r"`estimator.baseline` must be none with normalise=.*use estimator"
        ):
            Token(reward=R, baseline="reverse_kl", normalise=normalise)
    with pytest.raises(ConfigError, match=r"`regularizer.step_kl.coefficient` must be a finite number"):
        StepKL(coefficient=Linear(start=1.0, end=-1.0))
    with pytest.raises(
        ConfigError, match=r"`regularizer.step_kl.form` must be renormalised or tail for reverse_kl"
    ):
        StepKL(coefficient=1.0, form="plain")


# -- the single-step term


def test_step_kl_adds_the_exact_reverse_kl(world):
    scores, experience = world.on_everything(reverse_kl)
    token = Token(reward=LogRatio())(scores, experience, 0.0)
    loss = StepKL(coefficient=Linear(start=0.0, end=0.6))(token, scores, experience, 0.5)
    close(world.expected_gradient(loss), 1.3 * world.gradient(reverse(world)))
    close(loss.advantage, token.advantage)
    assert loss.metrics.keys() == {"log_ratio", "advantage", "step_kl"}


@pytest.mark.parametrize("form", ["renormalised", "tail", "plain"])
def test_step_kl_on_a_support_is_the_top_k_loss(world, form):

    def of(part):
        scores, experience = world.on_support(TeacherTopK(k=2))
        token = Token(reward=LogRatio())(scores, experience, 0.0)
        return world.expected_gradient(part(token, scores, experience))

    biased = form == "plain"
    step = StepKL(coefficient=0.5, form=form, biased=biased)
    alone = TopK(divergence=ReverseKL(), form=form, biased=biased)
    both = of(lambda token, scores, experience: step(token, scores, experience, 0.0))
    term = of(lambda token, scores, experience: alone(scores, experience, 0.0))
    close(both, of(lambda token, *_: token) + 0.5 * term)
