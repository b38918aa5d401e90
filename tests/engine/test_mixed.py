"""Drawing from two models at once: its ends are the two models' own draws, and its log-probs the mixture's."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.functional.mixing import bounded_geometric_mix, linear_mix
from opd_lightning.types import Finish, Generation, Sampling

from .conftest import VOCAB, build
from .test_draw import exact

SAMPLED = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, stop_ids=(5, 11), top_ids=3)
METHODS = ["loop", "generate"]


@pytest.fixture(scope="module")
def student():
    return build("qwen3")


@pytest.fixture(scope="module")
def teacher(student):
    """Another shape and family, far from the student."""
    return build("llama", hidden_size=48, num_hidden_layers=3)


def draw(student, teacher, prompts, combine, sampling=SAMPLED, method="auto", batch_size=4) -> Generation:
    engine = TransformersEngine(batch_size=batch_size, method=method)
    return engine.generate_mixed(student, teacher, prompts, sampling, combine)


def alone(model, prompts, sampling=SAMPLED, method="auto") -> Generation:
    return TransformersEngine(batch_size=4, method=method).generate(model, prompts, sampling)


def same(got: Generation, want: Generation) -> None:
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.finish, want.finish)
    assert torch.allclose(got.behavior_logp, want.behavior_logp, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "none", [partial(linear_mix, alpha=0.0), partial(bounded_geometric_mix, epsilon=0.0)]
)
def test_nothing_of_the_teacher_is_the_students_own_draw(none, method, student, teacher, prompts):
    got = draw(student, teacher, prompts, none, method=method)
    same(got, alone(student, prompts, method=method))
    assert torch.equal(got.top_ids, alone(student, prompts, method=method).top_ids)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "all_", [partial(linear_mix, alpha=1.0), partial(bounded_geometric_mix, epsilon=1e9)]
)
def test_nothing_of_the_student_is_the_teachers_own_draw(all_, method, student, teacher, prompts):
    got = draw(student, teacher, prompts, all_, method=method)
    want = alone(teacher, prompts, method=method)
    same(got, want)
    assert not torch.equal(got.top_ids, want.top_ids)  # the student's, not the sampler's


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_librarys_cache_serves_models_that_the_decoder_does_not_run(family, make, student, prompts):
    """Sliding windows shorter than the text; longest rows leave last."""
    model = make(family)
    long = replace(SAMPLED, max_new_tokens=24)
    got = draw(student, model, prompts, partial(linear_mix, alpha=1.0), long)
    same(got, alone(model, prompts, long))
    with pytest.raises(ConfigError, match=r"engine\.method"):
        draw(student, model, prompts, partial(linear_mix, alpha=1.0), method="loop")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "combine",
    [partial(linear_mix, alpha=0.4), partial(bounded_geometric_mix, epsilon=0.3)],
    ids=["linear", "geometric"],
)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_p": 0.8, "vocab": 30}], ids=str)
def test_log_probs_are_the_mixtures_after_truncation(settings, combine, method, student, teacher, prompts):
    sampling = Sampling(max_new_tokens=8, stop_ids=(5,), top_ids=3, **settings)
    got = draw(student, teacher, prompts, combine, sampling, method)
    for row in range(len(prompts)):
        text = got.ids[row][got.mask[row]].tolist()
        prompt = prompts.ids[row][prompts.mask[row]].tolist()
        ids = torch.tensor([prompt + text])
        with torch.no_grad():
            logp = [
                m(ids).logits[0, len(prompt) - 1 : -1, : sampling.vocab].log_softmax(-1)
                for m in (student, teacher)
            ]
        mixed = combine(*logp)
        for time, token in enumerate(text):
            want = exact(mixed[time], **settings)[token]
            assert want > 0
            assert float(got.behavior_logp[row, time].exp()) == pytest.approx(want, abs=1e-4)
            assert got.top_ids[row, time].tolist() == logp[0][time].topk(3).indices.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_a_row_does_not_depend_on_its_company(method, student, teacher, prompts):
    combine = partial(bounded_geometric_mix, epsilon=0.3)
    whole = draw(student, teacher, prompts, combine, method=method, batch_size=99)
    assert len(set(whole.mask.sum(-1).tolist())) > 2  # rows leave at different times
    for batch_size in (1, 3):
        same(draw(student, teacher, prompts, combine, method=method, batch_size=batch_size), whole)
    shuffled = [4, 2, 6, 0, 1]
    part = draw(student, teacher, prompts.rows(shuffled), combine, method=method)
    for row, source in enumerate(shuffled):
        assert torch.equal(part.ids[row][part.mask[row]], whole.ids[source][whole.mask[source]])


@pytest.mark.parametrize("method", METHODS)
def test_stop_ids_and_budget_end_a_row(method, student, teacher, prompts):
    combine = partial(linear_mix, alpha=0.5)
    free = draw(student, teacher, prompts, combine, replace(SAMPLED, stop_ids=()), method)
    assert (free.finish == Finish.LENGTH).all()
    stops = (int(free.ids[0, 0]), int(free.ids[3, 2]))
    got = draw(student, teacher, prompts, combine, replace(SAMPLED, stop_ids=stops), method)
    for row in range(len(prompts)):
        text = free.ids[row].tolist()
        end = next((i + 1 for i, token in enumerate(text) if token in stops), len(text))
        assert got.ids[row][got.mask[row]].tolist() == text[:end]
        assert int(got.finish[row]) == (Finish.EOS if text[end - 1] in stops else Finish.LENGTH)


def test_no_rows_and_models_left_as_they_were(student, teacher, prompts):
    teacher.train()
    empty = draw(student, teacher, prompts.rows([]), partial(linear_mix, alpha=0.5))
    assert empty.ids.shape == (0, 0)
    got = draw(student, teacher, prompts, partial(linear_mix, alpha=0.5))
    assert teacher.training
    teacher.eval()
    assert not student.training
    assert got.ids.max() < VOCAB
    assert not got.behavior_logp.requires_grad
