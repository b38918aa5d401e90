"""Where the reference policy comes from, and that it stays what it was."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from commands.own import SUMS, save_model, shipped_tokenizer, write_rows
from commands.running import Finished, here
from tiny import random_rollout, tiny_model
from transformers import AutoTokenizer

from opd_lightning.errors import ConfigError
from opd_lightning.loading import Loading
from opd_lightning.lora import Lora
from opd_lightning.models import load_model
from opd_lightning.reference.adapter_off import AdapterOff
from opd_lightning.reference.initial import Initial
from opd_lightning.reference.path import Path
from opd_lightning.scorer import Scorer
from opd_lightning.types import Want

TOKENIZER = shipped_tokenizer()
WIDTH = len(TOKENIZER)
WANT = Want(taken=True, entropy=True, support="exact", hidden=True)
ROLLOUT = random_rollout(4, vocab=WIDTH)
IDS = torch.randint(0, WIDTH, (4, 9, 3), generator=torch.Generator().manual_seed(0))


def loading(student: Scorer, path: object = "here", **more) -> Loading:
    settings = {"student_dtype": "float32", "tokenizer": TOKENIZER, "vocab": WIDTH, "scratch_mb": 1}
    return Loading(student=student, student_path=str(path), **settings | more)


def scores(scorer) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = scorer(ROLLOUT.tokens, WANT, IDS)
    return {name: getattr(found, name) for name in ("taken_logp", "entropy", "support_logp", "hidden")}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def train(scorer: Scorer) -> None:
    """Move what is trained, as an optimizer would."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def adapted() -> Scorer:
    model = tiny_model(3, vocab=WIDTH)
    Lora(rank=2, alpha=4, dropout=0.5, target_modules="all-linear").add_to(model, 0)
    return Scorer(model, scratch=1 << 20).train()


def test_the_initial_student_is_read_from_its_path(tmp_path):
    """As on resuming: the student that is given has long been trained."""
    path = save_model(tmp_path / "student")
    student = Scorer(load_model(str(path), "student.path"), scratch=1 << 20)
    before = scores(student)
    train(student)
    reference = Initial().load(loading(student, path))
    assert equal(scores(reference), before)
    assert not equal(scores(student), before)
    assert not any(parameter.requires_grad for parameter in reference.scorer.parameters())


def test_without_its_adapters_the_student_is_what_it_was(adapted):
    plain = Scorer(tiny_model(3, vocab=WIDTH), scratch=1 << 20).eval()
    reference = AdapterOff().load(loading(adapted))
    train(adapted)
    gradients = {name: p.requires_grad for name, p in adapted.named_parameters()}
    assert equal(scores(reference), scores(plain))
    assert reference.scorer is adapted
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == gradients
    assert all(module.training for module in adapted.modules())
    adapted.eval()
    assert not equal(scores(adapted), scores(plain)), "the adapters are not on again"


def test_adapters_that_are_frozen_stay_so(adapted):
    adapted.requires_grad_(False)
    scores(AdapterOff().load(loading(adapted)))
    assert not any(parameter.requires_grad for parameter in adapted.parameters())


def test_adapters_come_back_after_an_error(adapted):
    train(adapted.eval())
    on = scores(adapted)
    reference = AdapterOff().load(loading(adapted))
    with pytest.raises(AssertionError):
        reference(ROLLOUT.tokens, Want(support="exact"))  # without ids
    assert equal(scores(adapted), on)


def test_a_student_without_adapters_has_none_to_turn_off():
    with pytest.raises(ConfigError, match=r"`reference` must .* got adapter_off; use reference=initial"):
        AdapterOff().load(loading(Scorer(tiny_model(vocab=WIDTH))))


def test_another_model(tmp_path):
    path = save_model(tmp_path / "other", seed=4, vocab=WIDTH + 16)
    reference = Path(path=str(path), dtype="float32").load(loading(Scorer(tiny_model(vocab=WIDTH))))
    assert reference.scorer.vocab == WIDTH
    assert equal(scores(reference), scores(Scorer(load_model(str(path), "path"), WIDTH, scratch=1 << 20)))


def test_another_model_must_fit(tmp_path):
    student, path = Scorer(tiny_model(vocab=WIDTH)), str(save_model(tmp_path / "narrow"))
    with pytest.raises(ConfigError, match=r"`reference.path` must cover the \d+ ids"):
        Path(path=path, dtype="float32").load(loading(student, vocab=WIDTH + 8))
    with pytest.raises(ConfigError, match=r"`reference.path` must name a model, got None"):
        Path(path=None, dtype="float32").load(loading(student))


def test_another_model_must_have_the_students_tokenizer(tmp_path):
    """Two ids of ordinary tokens change places."""
    shipped_tokenizer().save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    path = str(save_model(tmp_path / "other", tokenizer=AutoTokenizer.from_pretrained(tmp_path)))
    with pytest.raises(ConfigError, match=r"`reference.path` must have the student's tokenizer"):
        Path(path=path, dtype="float32").load(loading(Scorer(tiny_model(vocab=WIDTH))))


# -- through the command


def run(tmp_path, *more: str) -> Finished:
    rows = write_rows(tmp_path / "sums.jsonl", SUMS)
    files = [f"task.{name}={rows}" for name in ("path", "val_path")]
    budget = ["debug=fast", "rollout.max_new_tokens=6", "evaluation.settings.max_new_tokens=6"]
    models = [
        f"student.path={save_model(tmp_path / 's')}",
        f"teacher.path={save_model(tmp_path / 't', seed=1)}",
    ]
    given = ["task=jsonl", *files, *models, *budget, "collector.steps_per_collection=1", "optimizer.lr=0.01"]
    return here("train", *given, "regularizer=[reference_kl]", *more, folder=tmp_path / "run")


def divergences(done: Finished) -> list[float]:
    assert done.summary["optimizer_steps"] == 2
    with (done.folder / "metrics.csv").open() as file:
        return [float(r["train/reference_kl"]) for r in csv.DictReader(file) if r.get("train/reference_kl")]


@pytest.mark.parametrize("form", ["full", "k2"])
@pytest.mark.parametrize(
    "reference",
    [["reference=initial"], ["reference=adapter_off", "student/lora=default", "student.lora.dropout=0"]],
)
def test_the_student_leaves_where_it_started(form, reference, tmp_path):
    """No divergence at the first step, some at the second."""
    first, second = divergences(run(tmp_path, *reference, f"regularizer.reference_kl.form={form}"))
    assert abs(first) < 1e-6
    assert second > 1e-5


def test_another_model_is_far_from_the_start(tmp_path):
    path = save_model(tmp_path / "r", seed=5, hidden_size=24, head_dim=12)
    first, _ = divergences(run(tmp_path, "reference=path", f"reference.path={path}"))
    assert first > 0.1


def test_no_part_no_reference(tmp_path):
    """A reference that cannot be loaded does not matter where nobody reads it."""
    done = run(tmp_path, "reference=path", "reference.path=no/such", "regularizer=[]")
    assert done.summary["optimizer_steps"] == 2


def test_refuses_in_one_sentence(tmp_path):
    assert "`reference` must be initial or path" in run(tmp_path, "reference=adapter_off").sentence
