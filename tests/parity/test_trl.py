"""The same values and gradients as public code: trl 1.16.0 (pip install 'opd-lightning[parity]'), on a CPU.

In float32, as trained, to within the rounding of either side; in float64, where trl has it, with sharper
models and to 1e-12. Logits have no ties. trl is imported by the first test that wants it, as that takes
seconds; some names are private to it, and a trl without them skips the test.
"""

import os
import warnings
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from opd_lightning.functional.divergence import FORMS, forward_kl, jsd, reverse_kl
from opd_lightning.functional.head import Head, exact, full, support_logits
from opd_lightning.functional.masked import masked_mean, masked_sum
from opd_lightning.functional.ratio import importance_weight, log_ratio
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.support.union import Union
from opd_lightning.types import Candidates

ROWS, TIME, HIDDEN, K = 2, 6, 16, 8
BETAS = [0.0, 0.3, 1.0]
vocabularies = pytest.mark.parametrize("vocab", [1_000, 32_000])
betas = pytest.mark.parametrize("beta", BETAS)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def public(module, name):
    """Return a name of trl, or skip the test where it cannot be imported."""
    with warnings.catch_warnings(), mock.patch.dict(os.environ, TRL_EXPERIMENTAL_SILENCE="1"):
        warnings.simplefilter("ignore")
        found = pytest.importorskip(f"trl.{module}", reason="needs trl 1.16.0", exc_type=ImportError)
    if not hasattr(found, name):
        pytest.skip(f"this trl has no {name} in {module}; needs trl 1.16.0")
    return getattr(found, name)


@pytest.fixture(scope="module")
def gkd():
    return public("experimental.gkd.gkd_trainer", "GKDTrainer").generalized_jsd_loss


@pytest.fixture(scope="module")
def iw_opd():
    return public("experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer").generalized_jsd_loss


@pytest.fixture(scope="module")
def sdpo():
    return partial(public, "experimental.sdpo.loss_utils")


@pytest.fixture(scope="module")
def chunked():
    return public("trainer.distillation_trainer", "_chunked_divergence_loss")


def pair(vocab, dtype=torch.float32):
    """Logits of a student (with gradient) and of a teacher."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, ROWS, TIME, vocab, generator=draw).to(dtype)
    sharpness = 3.0 if dtype == torch.float64 else 1.0
    return (sharpness * student).requires_grad_(), sharpness * teacher


def labels():
    """trl's: -100 where a token is not in the loss; and the same as a mask."""
    ids = torch.arange(ROWS * TIME).reshape(ROWS, TIME)
    ids[0, 3:] = -100
    ids[1, 0] = -100
    return ids, ids != -100


def same(ours, theirs, *inputs):
    """The same value, and gradients to a share of the largest; a probe weighs positions apart.

    float32 rounds a log-prob of -10 by 5e-7 and so the probability too, on both sides: at 32,000 ids the
    gradients differ by up to 4e-6. In float64 it is 2e-13.
    """
    single = theirs.dtype == torch.float32
    rtol, atol, share = (1e-5, 2e-7, 1e-5) if single else (1e-12, 0.0, 1e-12)
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    probe = torch.rand(theirs.shape, generator=torch.Generator().manual_seed(9)) + 0.5
    for mine, other in zip(
        torch.autograd.grad((ours * probe).sum(), inputs, retain_graph=True),
        torch.autograd.grad((theirs * probe).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=0, atol=share * other.abs().max().item())


def on_support(support, form, divergence, student, teacher, temperature=1.0):
    """Our side: ids from a support, log-probs of the full softmax there, one form, one divergence."""
    student, teacher = student / temperature, teacher / temperature
    candidates = Candidates(
        taken=student.argmin(-1),
        teacher_top=teacher.topk(K).indices,
        student_top=student.detach().topk(K).indices,
    )
    ids, valid = support(candidates)
    change = FORMS[form]
    student_logp, teacher_logp = (m.log_softmax(-1).gather(-1, ids) for m in (student, teacher))
    return divergence(change(student_logp, valid), change(teacher_logp, valid))


# -- the whole vocabulary


@precisions
@vocabularies
@betas
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_exact_divergence(gkd, vocab, beta, temperature, dtype):
    student, teacher = pair(vocab, dtype)
    ids, mask = labels()
    # Dividing by the temperature gives no factor of its square on either side.
    pairs = ((student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1))
    ours = jsd(*pairs, beta=beta)
    options = {"beta": beta, "temperature": temperature}
    same(ours, gkd(student, teacher, reduction="none", **options).sum(-1), student)
    same(masked_mean(ours, mask), gkd(student, teacher, labels=ids, **options), student)
    theirs = gkd(student, teacher, labels=ids, num_items_in_batch=torch.tensor(17), **options)
    same(masked_sum(ours, mask) / 17, theirs, student)


@precisions
@vocabularies
def test_the_ends_of_the_jsd_are_the_kls(gkd, vocab, dtype):
    student, teacher = pair(vocab, dtype)
    for beta, divergence in ((0, forward_kl), (1, reverse_kl)):
        ours = divergence(student.log_softmax(-1), teacher.log_softmax(-1))
        same(ours, gkd(student, teacher, beta=beta, reduction="none").sum(-1), student)


HEADS = {
    "linear": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 4.0},
    "temperature": {"temperature": 0.7},
    "everything": {"bias": True, "scale": 0.5, "softcap": 4.0, "temperature": 0.7},
}


def backbone(vocab, seed, width=HIDDEN, bias=False, **options):
    """Hidden states and a head."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, TIME, width, generator=draw).requires_grad_()
    head = Head(weight=(torch.randn(vocab, width, generator=draw) / width**0.5).requires_grad_(), **options)
    drawn = (0.5 * torch.randn(vocab, generator=draw)).requires_grad_()
    return hidden, replace(head, bias=drawn) if bias else head


@vocabularies
@betas
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_divergence_from_hidden_states(chunked, vocab, beta, options):
    hidden, head = backbone(vocab, 0, **options)
    teacher_hidden, teacher_head = backbone(vocab, 1, width=24, **options)
    mask = labels()[1]
    theirs, their_entropy, count = chunked(
        hidden,
        teacher_hidden.detach(),
        head.weight,
        teacher_head.weight.detach(),
        mask.long(),
        beta,
        student_lm_head_bias=head.bias,
        teacher_lm_head_bias=None if teacher_head.bias is None else teacher_head.bias.detach(),
        student_logit_scale=head.scale,
        teacher_logit_scale=teacher_head.scale,
        student_final_logit_softcapping=head.softcap,
        teacher_final_logit_softcapping=teacher_head.softcap,
        temperature=head.temperature,
    )
    divergence = partial(jsd, beta=beta)
    ours = full(hidden[mask], head, teacher_hidden[mask], teacher_head, divergence, scratch=512).mean()
    inputs = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    same(ours, theirs, *inputs)
    none = torch.zeros(int(mask.sum()), 0, dtype=torch.long)
    entropy = exact(hidden[mask], head, none, entropy=True, scratch=512).entropy
    assert count == mask.sum()
    torch.testing.assert_close(entropy.sum(), their_entropy, rtol=1e-5, atol=0)


# -- a support


@precisions
@vocabularies
@betas
@pytest.mark.parametrize("form", ["tail", "renormalised"])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_support_and_form(iw_opd, vocab, beta, form, temperature, dtype):
    """trl's support follows from beta: the teacher's at 0, the student's at 1, else both."""
    student, teacher = pair(vocab, dtype)
    support = {0.0: TeacherTopK(k=K), 1.0: StudentTopK(k=K)}.get(beta, Union(k=K))
    ours = on_support(support, form, partial(jsd, beta=beta), student, teacher, temperature)
    options = {"beta": beta, "temperature": temperature, "top_k": K, "add_tail": form == "tail"}
    theirs = iw_opd(student, teacher, reduction="none", **options).sum(-1)
    same(ours, theirs, student)
    ids, mask = labels()
    same(masked_mean(ours, mask), iw_opd(student, teacher, labels=ids, **options), student)


@precisions
@vocabularies
@pytest.mark.parametrize("alpha", [*BETAS, 0.5])
@pytest.mark.parametrize("form", ["tail", "renormalised"])
def test_students_top(sdpo, vocab, alpha, form, dtype):
    student, teacher = pair(vocab, dtype)
    theirs = sdpo("compute_topk_self_distillation_loss")(
        student,
        teacher,
        distillation_topk=K,
        distillation_alpha=alpha,
        distillation_add_tail=form == "tail",
    )
    ours = on_support(StudentTopK(k=K), form, partial(jsd, beta=alpha), student, teacher)
    same(ours, theirs, student)


@vocabularies
def test_rows_of_the_head_are_enough_for_a_renormalised_support(iw_opd, vocab):
    """The teacher's top ids with K rows of the head against trl with all logits: local support matching."""
    hidden, head = backbone(vocab, 0)
    teacher = pair(vocab)[1]
    ids = teacher.topk(K).indices
    raw = support_logits(hidden.flatten(0, 1), head, ids.flatten(0, 1)).reshape(ids.shape)
    valid = torch.ones_like(ids, dtype=torch.bool)
    change = FORMS["renormalised"]
    ours = forward_kl(change(raw, valid), change(teacher.gather(-1, ids), valid))
    logits = hidden @ head.weight.T
    theirs = iw_opd(logits, teacher, beta=0, top_k=K, add_tail=False, reduction="none").sum(-1)
    same(ours, theirs, hidden, head.weight)


# -- the taken token


@precisions
@vocabularies
def test_sampled_token(sdpo, vocab, dtype):
    student, teacher = pair(vocab, dtype)
    taken = torch.randint(vocab, (ROWS, TIME, 1), generator=torch.Generator().manual_seed(1))
    theirs = sdpo("compute_sampled_token_self_distillation_loss")(
        student, teacher, taken.squeeze(-1), distillation_alpha=1.0
    )
    student_logp, teacher_logp = (m.log_softmax(-1).gather(-1, taken).squeeze(-1) for m in (student, teacher))
    same(-log_ratio(student_logp, teacher_logp).detach() * student_logp, theirs, student)


@pytest.mark.parametrize("cap", [2.0, 5.0])
def test_importance_clipping(sdpo, cap):
    draw = torch.Generator().manual_seed(0)
    student = (torch.randn(ROWS, TIME, generator=draw) * 3).requires_grad_()
    old = student.detach() + torch.randn(ROWS, TIME, generator=draw)
    old[0, 0], old[0, 1] = student[0, 0].item() - 40, student[0, 1].item() + 40
    loss = student.square()
    theirs = sdpo("apply_importance_sampling_clipping")(loss, student, old, cap)
    weight = importance_weight(student, old, cap=cap)
    assert weight.max() == cap
    same(loss * weight, theirs, student)
