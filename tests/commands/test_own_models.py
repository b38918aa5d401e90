"""A user's own models and problems through the command: tiny random models of several families, jsonl files."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands.own import FAMILIES, SUMS, save_model, shipped_tokenizer, write_rows
from commands.running import Finished, here

CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Answer in a word."},
            {"role": "user", "content": row["prompt"]},
        ]
    }
    for row in SUMS
]
"""The same problems as chats, without answers."""
SMALL = ["debug=fast", "rollout.max_new_tokens=8", "evaluation.settings.max_new_tokens=8"]
WIDTH = len(shipped_tokenizer())


def train(tmp_path, student, teacher, rows, *more: str) -> Finished:
    """Train on ``rows``, held out too."""
    files = [f"task.{name}={rows}" for name in ("path", "val_path")]
    models = [f"student.path={student}", f"teacher.path={teacher}"]
    return here("train", "task=jsonl", *files, *models, *SMALL, *more, folder=tmp_path / "run")


def tensors_of(value) -> list[torch.Tensor]:
    """Return every tensor inside nested containers."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for inner in value for t in tensors_of(inner)] if isinstance(value, list | tuple) else []


def shared(tensors, others) -> list[torch.Tensor]:
    """Return the tensors whose values are among the others, but for those of fresh norms, all ones."""
    known = {t.numpy(force=True).tobytes() for t in others if t.numel() > 1 and t.unique().numel() > 1}
    return [t for t in tensors if t.numpy(force=True).tobytes() in known]


# -- families


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family, tmp_path, sums):
    """It trains; the student is what ``from_pretrained`` loads; the teacher leaves no trace of its weights."""
    student = save_model(tmp_path / "student", family)
    teacher = save_model(tmp_path / "teacher", family, seed=1, hidden_size=24, head_dim=12)
    done = train(tmp_path, student, teacher, sums)
    assert done.summary["optimizer_steps"] == 2
    assert len(done.losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in done.losses)

    trained = AutoModelForCausalLM.from_pretrained(done.folder / "student")
    assert type(trained) is FAMILIES[family][1]
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "student")
    chat = [{"role": "user", "content": "one and two"}]
    assert tokenizer.apply_chat_template(chat) == shipped_tokenizer().apply_chat_template(chat)
    ids = tokenizer("one and two", return_tensors="pt")["input_ids"]
    assert trained.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, ids.shape[1] + 2)

    before, after = (
        load_file(student / "model.safetensors"),
        load_file(done.folder / "student" / "model.safetensors"),
    )
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(t.isfinite().all() for t in after.values())
    assert not shared(after.values(), before.values()), "some weights have not been trained"
    taught = list(load_file(teacher / "model.safetensors").values())
    (saved,) = done.folder.glob("checkpoints/step=*.ckpt")
    checkpoint = torch.load(saved, weights_only=False)
    for kept in (list(after.values()), tensors_of(checkpoint)):
        assert kept
        assert not shared(kept, taught)
        assert not [t for t in kept if 24 in t.shape]  # the teacher's width
    assert shared(tensors_of(checkpoint["state_dict"]), after.values())


def test_the_exact_divergence_leaves_no_teacher_behind(tmp_path, sums):
    """There the learning half holds the teacher's head, which must reach neither optimizer nor checkpoint."""
    student, teacher = (
        save_model(tmp_path / "student"),
        save_model(tmp_path / "teacher", seed=1, hidden_size=24),
    )
    done = train(tmp_path, student, teacher, sums, "support=full")
    assert all(math.isfinite(loss) and loss > 0 for loss in done.losses)
    taught = list(load_file(teacher / "model.safetensors").values())
    (saved,) = done.folder.glob("checkpoints/step=*.ckpt")
    kept = tensors_of(torch.load(saved, weights_only=False))
    kept += load_file(done.folder / "student" / "model.safetensors").values()
    assert not shared(kept, taught)
    assert not [t for t in kept if 24 in t.shape]


# -- vocabularies


@pytest.mark.parametrize(("student", "teacher"), [(16, 48), (48, 16)], ids=["wide teacher", "wide student"])
@pytest.mark.parametrize("support", ["student", "full"])
def test_padded_widths_with_one_tokenizer(student, teacher, support, tmp_path, sums):
    """As 151,936 and 152,064: read up to the smaller width, saved at the student's own."""
    models = [
        save_model(tmp_path / name, seed=seed, vocab=WIDTH + padding)
        for seed, (name, padding) in enumerate({"student": student, "teacher": teacher}.items())
    ]
    done = train(
        tmp_path, *models, sums, f"support={support}", "callbacks=[]", "evaluation.settings.samples=0"
    )
    assert len(done.losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in done.losses)
    weights = load_file(done.folder / "student" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape[0] == WIDTH + student


def test_padding_of_either_model_changes_nothing(tmp_path, sums):
    """Rows that no token has do not exist for any probability: the losses are those of unpadded models."""
    losses = []
    for student, teacher in ((0, 0), (32, 0), (0, 32)):
        folder = tmp_path / f"{student}-{teacher}"
        folder.mkdir()
        models = []
        for seed, (name, padding) in enumerate({"student": student, "teacher": teacher}.items()):
            models.append(save_model(folder / name, seed=seed, vocab=WIDTH))
            pad(models[-1], padding)
        done = train(folder, *models, sums, "support=union", "callbacks=[]", "evaluation.settings.samples=0")
        losses.append(done.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def pad(folder, rows: int) -> None:
    """Widen a saved model by rows that would win every draw."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(WIDTH + rows, mean_resizing=False)
    if rows:
        weight = model.get_output_embeddings().weight.data
        weight[WIDTH:] = 50 * weight[:rows]
    model.save_pretrained(folder)


# -- files


def test_what_a_run_leaves(tmp_path, sums):
    """With answers: every file and number that a run promises."""
    model = save_model(tmp_path / "model")
    teacher = save_model(tmp_path / "teacher", seed=1)
    done = train(tmp_path, model, teacher, sums, "evaluation.settings.problems=3", "seed=5")
    summary = done.summary
    for name in ("accuracy_before", "accuracy_after", "accuracy_before_sampled", "accuracy_after_sampled"):
        assert 0 <= summary[name] <= 1
    assert 0 <= summary["teacher_accuracy"] <= 1
    assert summary["seconds"] > 0
    assert 0 < summary["response_tokens"] <= 4 * 2 * 8
    assert {"generate", "score", "train", "evaluate"} <= summary["tokens_per_second"].keys()
    assert all(rate > 0 for rate in summary["tokens_per_second"].values())
    assert summary["peak_memory_mb"] > 10
    assert f"student.path={model}" in summary["overrides"]
    assert "seed=5" in summary["overrides"]
    assert {"git_commit", "optimizer_steps"} <= summary.keys()
    assert summary["evaluations"].keys() == {"0", "2"}

    text = (done.folder / "config.yaml").read_text()
    assert "${" not in text
    config = OmegaConf.create(text)
    assert config.seed == 5
    assert config.student.path == str(model)
    assert config.estimator.divergence._target_.endswith("ReverseKL")
    assert config.callbacks.checkpoint.dirpath == str(done.folder / "checkpoints")

    with (done.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["train/loss"]]
    assert len(steps) == 2
    for name in ("train/grad_norm", "train/lr", "train/divergence", "train/tokens"):
        assert all(float(row[name]) > 0 for row in steps)
    for name in (
        "rollout/length",
        "teacher/entropy",
        "student/entropy",
        "support/student_mass",
        "support/teacher_mass",
    ):
        assert float(steps[0][name]) > 0
    events = EventAccumulator(str(done.folder)).Reload()
    assert {"train/loss", "eval/accuracy", "rollout/length", "time/generate_tokens_per_second"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("train/loss")] == [0, 1]
    assert any("rollout/samples" in tag for tag in events.Tags()["tensors"])
    (checkpoint,) = done.folder.glob("checkpoints/step=*.ckpt")
    assert torch.load(checkpoint, weights_only=False)["global_step"] == 2


def test_chats_without_answers(tmp_path):
    """No accuracy can be known, and none is made up; lengths still are measured."""
    model, teacher = save_model(tmp_path / "model"), save_model(tmp_path / "teacher", seed=1)
    rows = write_rows(tmp_path / "chats.jsonl", CHATS)
    done = train(tmp_path, model, teacher, rows)
    summary = done.summary
    for name in ("accuracy_before", "accuracy_after", "accuracy_before_sampled", "accuracy_after_sampled"):
        assert summary[name] is None
    assert summary["teacher_accuracy"] is None
    assert summary["evaluations"]["0"]["eval/length"] > 0
    assert json.loads((done.folder / "summary.json").read_text()) == summary
    assert len(done.losses) == 2


def test_no_held_out_file(tmp_path, sums):
    """Then nothing is evaluated, and the run is otherwise the same."""
    model, teacher = save_model(tmp_path / "model"), save_model(tmp_path / "teacher", seed=1)
    done = here(
        *(
            "train",
            "task=jsonl",
            f"task.path={sums}",
            f"student.path={model}",
            f"teacher.path={teacher}",
            *SMALL,
        ),
        folder=tmp_path / "run",
    )
    assert done.summary["accuracy_before"] is done.summary["accuracy_after"] is None
    assert done.summary["evaluations"] == {}
    assert len(done.losses) == 2
    assert (done.folder / "student" / "model.safetensors").is_file()


def test_some_answers(tmp_path):
    """Accuracy is over the rows that have one: here both are wrong, whatever the rest would be."""
    model = save_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [*CHATS, *({**row, "answer": "-1"} for row in SUMS[:2])])
    done = train(tmp_path, model, model, rows, "evaluation.settings.problems=null")
    assert done.summary["accuracy_before"] == 0


def test_a_tokenizer_without_a_chat_template(tmp_path, sums):
    """A base model's: the prompt is the text itself."""
    tokenizer = shipped_tokenizer()
    tokenizer.chat_template = None
    model = save_model(tmp_path / "model", tokenizer=tokenizer)
    done = train(tmp_path, model, model, sums)
    assert len(done.losses) == 2
    assert AutoTokenizer.from_pretrained(done.folder / "student").chat_template is None


def test_a_path_below_home(tmp_path, sums, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(tmp_path / "model")
    done = train(tmp_path, "'~/model'", "'~/model'", sums, "callbacks=[]", "evaluation.settings.samples=0")
    assert len(done.losses) == 2


def test_long_prompts_are_left_out_and_reported(tmp_path):
    model = save_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [*SUMS, *({"prompt": "one more " * n} for n in (50, 80))])
    done = train(tmp_path, model, model, rows, "collector.max_prompt_tokens=60")
    assert done.code == 0
    reports = [line for line in done.out.splitlines() if "2 of 8 prompts are longer than 60 tokens" in line]
    assert len(reports) == 2  # of the training file and the held-out one
    assert all("raise collector.max_prompt_tokens to" in line for line in reports)
