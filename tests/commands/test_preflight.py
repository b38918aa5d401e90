"""``preflight`` and the same checks at the start of a run: what is found, all at once, without loading a model."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file
from serving.servers import a_bench, serving

from commands.own import save_model, shipped_tokenizer
from commands.running import here
from commands.test_refusals import refusal
from opd_lightning.checks.finding import Finding, look, ok
from opd_lightning.checks.machine import devices, disk, memory_there
from opd_lightning.checks.pairing import turn_end
from opd_lightning.errors import ConfigError


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal in which a row of the table is a line."""
    monkeypatch.setenv("COLUMNS", "2000")


def rows(done, level: str) -> list[str]:
    """Return the table's rows of a level, without its lines."""
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if "│" in line
    ]
    return [" ".join(cells[1:]).strip() for cells in lines if cells[0] == level]


@pytest.mark.usefixtures("models_stay_closed")
class TestWithoutAModel:
    def test_of_the_default_run(self, tmp_path):
        done = here("preflight", folder=tmp_path / "run")
        assert done.code == 0, done.err
        assert done.err == ""
        assert not rows(done, "error") + rows(done, "warning")
        told = "\n".join(rows(done, "ok"))
        for words in (
            "has the student's tokenizer, 448 ids",
            "stops at <|im_end|>",
            "ends responses where the student does",
            "has prompts of the student's form",
            "has a context of 1024 tokens for rows of at most 640",
            "can be written",
            "free, a checkpoint takes about 0.00351 GB",
            "an estimated",
            "task, validation 256 prompts",
        ):
            assert words in told
        assert not list((tmp_path / "run").iterdir())

    def test_of_many_mistakes_at_once(self, tmp_path):
        wrong = [
            "seed=-1",
            "trainer.precision=8",
            "rollout.top_p=2",
            "student.scoring_temperature=0",
            "evaluation.settings.max_new_tokens=5000",
            "teacher.scoring_temperature=3",
        ]
        done = here("preflight", *wrong, folder=tmp_path / "run")
        refusal(done, "seed", "got -1")
        errors = rows(done, "error")
        fields = [row.split()[0] for row in errors]
        assert fields == [
            "seed",
            "trainer.precision",
            "rollout.top_p",
            "student.scoring_temperature",
            "teacher.scoring_temperature",
            "evaluation.settings.max_new_tokens",
        ]
        assert "use 512, or lower collector.max_prompt_tokens" in errors[-1]

    @pytest.mark.parametrize("command", ["preflight", "train"])
    def test_of_a_context_that_is_too_short(self, command, tmp_path):
        done = here(command, "rollout.max_new_tokens=513", folder=tmp_path / "run")
        refusal(done, "student.path", "at least 1025 tokens", "got 1024", "lower rollout.max_new_tokens")
        assert here("preflight", "rollout.max_new_tokens=512", folder=tmp_path / "fits").code == 0

    def test_of_a_teacher_with_prompts_of_its_own(self, tmp_path):
        own = ["teacher=self", "teacher.max_prompt_tokens=1000", "task=jsonl"]
        done = here("preflight", *own, f"task.path={tmp_path}", folder=tmp_path / "run")
        assert any("at least 1128 tokens, prompts of 1000" in row for row in rows(done, "error"))

    def test_of_another_end_and_another_template(self, tmp_path):
        """A base model's student beside an instructed teacher."""
        tokenizer = shipped_tokenizer()
        student = save_model(tmp_path / "student", tokenizer=tokenizer, eos_token_id=1)
        for name in ("config.json", "generation_config.json"):
            settings = json.loads((student / name).read_text()) | {"eos_token_id": 1}
            (student / name).write_text(json.dumps(settings))
        settings = json.loads((student / "tokenizer_config.json").read_text())
        (student / "tokenizer_config.json").write_text(
            json.dumps(settings | {"eos_token": tokenizer.convert_ids_to_tokens(1)})
        )
        tokenizer.chat_template = tokenizer.chat_template.replace("\\n", " ")
        teacher = save_model(tmp_path / "teacher", tokenizer=tokenizer)
        models = [f"student.path={student}", f"teacher.path={teacher}"]
        done = here("preflight", *models, folder=tmp_path / "run")
        assert done.code == 0, done.err
        end, teacher_end, template = rows(done, "warning")
        assert (
            "should stop where its chat template ends a turn, at '<|im_end|>' (id 2), got the stop ids [1]"
            in end
        )
        assert "add 2 to eos_token_id in its generation_config.json" in end
        assert "got [2] (<|im_end|> beside)" in teacher_end
        assert "should have the student's chat template" in template
        assert "copy the chat template" in template

    def test_of_a_student_that_nothing_stops(self, tmp_path):
        tokenizer = shipped_tokenizer()
        model = save_model(tmp_path / "model", tokenizer=tokenizer, eos_token_id=None)
        settings = json.loads((model / "tokenizer_config.json").read_text())
        settings.pop("eos_token")
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        done = here("preflight", f"student.path={model}", folder=tmp_path / "run")
        refusal(done, "student.path", "a stop token", "add eos_token_id")

    @pytest.mark.parametrize(
        ("limits", "arguments", "field", "parts"),
        [
            ({"context": 639}, [], "teacher.address", ["rows of at least 640 tokens", "got 639"]),
            ({"context": 640, "most_ids": 15}, [], "support.k", ["got 16", "max_ids=15"]),
            ({"context": 640}, ["engine.batch_size=64"], None, ["answers, and takes rows of 640 tokens"]),
        ],
        ids=["rows", "ids", "fits"],
    )
    def test_of_a_server(self, limits, arguments, field, parts, tmp_path):
        with serving(a_bench(**limits)) as (address, _):
            served = ["teacher=served", f"teacher.address={address}"]
            done = here("preflight", *served, *arguments, folder=tmp_path / "run")
        if field is None:
            assert done.code == 0
            assert any(parts[0] in row for row in rows(done, "ok"))
        else:
            refusal(done, field, *parts)

    def test_of_a_model_larger_than_the_memory(self, tmp_path):
        model = save_model(tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        there = memory_there(cuda=False)
        config |= {"num_hidden_layers": 16, "hidden_size": 2**14, "intermediate_size": 2**17}
        del config["layer_types"]
        (model / "config.json").write_text(json.dumps(config))
        assert there < 12 * 16 * 3 * 2**31
        done = here("train", f"student.path={model}", "teacher=self", folder=tmp_path / "run")
        refusal(done, "student.path", "fit into", "optimizer state", "student/lora=default")


def test_warnings_are_a_line_each_and_the_run_goes_on(tmp_path):
    tokenizer = shipped_tokenizer()
    tokenizer.chat_template = None
    teacher = save_model(tmp_path / "teacher", tokenizer=tokenizer)
    quick = [
        "debug=fast",
        "trainer.max_steps=1",
        "collector.prompts_per_collection=2",
        "evaluation.teacher=false",
    ]
    done = here("train", *quick, f"teacher.path={teacher}", folder=tmp_path / "run")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("warning ")]
    assert line.startswith("warning   `teacher.path` should have the student's chat template")


# -- one by one


def test_a_turn_ends_with_the_token_behind_the_answer():
    tokenizer = shipped_tokenizer()
    assert turn_end(tokenizer) == 2
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    assert turn_end(tokenizer) is None


def test_a_disk_without_room(tmp_path, monkeypatch):
    """Room is what the system says of the nearest folder that exists."""
    model = save_model(tmp_path / "model")
    file = model / "model.safetensors"
    count, size = sum(t.numel() for t in load_file(file).values()), file.stat().st_size
    usage = shutil.disk_usage(tmp_path)
    checkpoint = 12 * count
    for free, level in (
        (checkpoint + size - 1, "error"),
        (3 * checkpoint + size - 1, "warning"),
        (3 * checkpoint + size, "ok"),
    ):
        monkeypatch.setattr("shutil.disk_usage", lambda place, free=free: usage._replace(free=free))
        (found,) = look({"disk": disk}, {"folder": tmp_path / "a" / "b", "student_path": str(model)})
        assert found.level == level
        assert level == "ok" or f"at {tmp_path}" in found.sentence


def test_devices(monkeypatch):
    def found(**settings):
        (finding,) = look({"devices": devices}, {"trainer": settings})
        return finding

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert found(accelerator="gpu", devices=2).level == "ok"
    assert found(accelerator="gpu", devices="auto").level == "ok"
    assert found(accelerator="gpu", devices=3).line == (
        "`trainer.devices` must be at most the 2 GPUs here, got 3; use trainer.devices=2"
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert found(accelerator="gpu", devices=1).remedy == "use trainer=cpu"
    assert found(accelerator="cpu", devices=10**6).level == "warning"


def test_a_check_runs_where_all_that_it_reads_is_there_and_a_broken_one_is_a_warning():
    def reads(one, two):
        yield ok("one", f"{one}{two}")

    def refuses(one):
        raise ConfigError("`a.b` must be c, got d; use e")

    def breaks(one):
        raise ZeroDivisionError("oh")

    found = list(look({"reads": reads, "refuses": refuses, "breaks": breaks}, {"one": 1}))
    assert [f.level for f in found] == ["error", "warning"]
    assert found[0] == Finding(level="error", field="a.b", sentence="must be c, got d", remedy="use e")
    assert found[0].line == "`a.b` must be c, got d; use e"
    assert "ZeroDivisionError: oh" in found[1].line
    assert [f.line for f in look({"reads": reads}, {"one": 1, "two": 2})] == ["`one` 12"]
