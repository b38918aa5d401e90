"""The user's own files: what is read, and each refusal with the sentence that it leaves."""

import json
import sys

import pytest
from omegaconf import OmegaConf

from opd_lightning.errors import ConfigError
from opd_lightning.paths import CONF_DIR
from opd_lightning.protocols import Task
from opd_lightning.task.jsonl import Jsonl


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good.jsonl", {"prompt": "1+1?", "answer": 2})


def test_reads_prompts_messages_and_what_may_follow(tmp_path):
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": "Wie viel ist 1+1?\n", "answer": 2, "response": "\\boxed{2}", "difficulty": "easy"},
        "\n",  # blank lines are skipped
        {"messages": chat, "source": "mine"},
    )
    task = Jsonl(path=path)
    assert isinstance(task, Task)
    first, second = task.problems("train")
    assert first.messages == ({"role": "user", "content": "Wie viel ist 1+1?\n"},)
    assert (first.index, first.answer, first.response, first.difficulty) == (0, "2", "\\boxed{2}", "easy")
    assert list(second.messages) == chat
    assert (second.index, second.answer, second.response, dict(second.extra)) == (
        1,
        None,
        None,
        {"source": "mine"},
    )
    assert task.grade(first, "<think>1+1=2</think>\\boxed{2}") == 1.0
    assert task.grade(first, "\\boxed{3}") == 0.0
    assert task.grade(second, "\\boxed{4}") is None


def test_splits(tmp_path, good):
    held_out = write(tmp_path / "val.jsonl", {"prompt": "a"}, {"prompt": "b"})
    task = Jsonl(path=good, val_path=held_out)
    assert [len(task.problems(split)) for split in ("train", "validation", "test")] == [1, 2, 0]
    assert len(Jsonl(path=good, test_path=held_out).problems("test")) == 2
    with pytest.raises(ConfigError, match="`split` must be one of train, validation, test, got 'dev'"):
        task.problems("dev")


def test_byte_order_mark_and_other_scripts(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes("﻿".encode() + json.dumps({"prompt": "数学 é"}, ensure_ascii=False).encode() + b"\r\n")
    assert Jsonl(path=str(path)).problems("train")[0].messages[0]["content"] == "数学 é"


REFUSED = {
    "empty": ([], r"`task.path` must hold at least one problem, got '.*data.jsonl'; the file is empty"),
    "blank": (["\n", "  \n"], r"`task.path` must hold at least one problem"),
    "broken": (
        [{"prompt": "a"}, "\n", '{"prompt": \n'],
        r"`task.path` must hold one JSON object a line, got a broken one at .*data.jsonl:3 \(.*\); correct or",
    ),
    "no prompt": (
        [{"prompt": "a"}, {"question": "b"}],
        r"`task.path` must give each row a `prompt` or `messages`, got neither at .*data.jsonl:2; write",
    ),
    "empty prompt": ([{"prompt": ""}], r"got neither at .*data.jsonl:1"),
    "not an object": (["7\n"], r"got neither at .*data.jsonl:1"),
    "messages as text": (
        [{"messages": "hi"}],
        r"messages as a list of objects .*, got 'hi' at .*:1; write",
    ),
    "a prompt of numbers": (
        [{"prompt": "fine"}, {"prompt": 7}],
        r"`prompt` as text or chat messages .*, got 7 at .*:2; write",
    ),
    "no content": (
        [{"messages": [{"role": "user"}]}],
        r"as a list of objects with role and content, got .*:1",
    ),
    "parts as content": (
        [{"messages": [{"role": "user", "content": [{"type": "text"}]}]}],
        r"as a list of objects with role and content, got .*:1",
    ),
    "solution last": (
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        r"must give `messages` that end before the answer, got an assistant's turn last at .*:1; move",
    ),
}


@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_rows(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        Jsonl(path=write(tmp_path / "data.jsonl", *rows)).problems("train")


def test_refused_bytes(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(ConfigError, match=r"broken one at .*latin.jsonl:2 \('utf-8' codec"):
        Jsonl(path=str(path)).problems("train")


@pytest.mark.parametrize("field", ["path", "val_path", "test_path"])
def test_a_missing_file_is_refused_at_construction(tmp_path, good, field):
    files = {"path": good} | {field: str(tmp_path / "nothing.jsonl")}
    with pytest.raises(
        ConfigError, match=rf"`task.{field}` must be a file, got '.*nothing.jsonl'; check the path"
    ):
        Jsonl(**files)


def test_the_field_of_a_refusal_is_the_split_s(tmp_path, good):
    with pytest.raises(ConfigError, match=r"`task.val_path` must hold at least one problem"):
        Jsonl(path=good, val_path=write(tmp_path / "val.jsonl")).problems("validation")


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["a", "b"], "answer": ["1", None]})
    parquet.write_table(table, tmp_path / "train.parquet")
    first, second = Jsonl(path=str(tmp_path / "train.parquet")).problems("train")
    assert (first.answer, second.answer) == ("1", None)
    write(tmp_path / "broken.parquet", "not parquet")
    with pytest.raises(ConfigError, match=r"`task.path` must be a parquet file, got '.*broken.parquet'"):
        Jsonl(path=str(tmp_path / "broken.parquet")).problems("train")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "train.parquet", "")
    with pytest.raises(ConfigError, match=r"parquet needs pyarrow; pip install 'opd-lightning\[parquet\]'"):
        Jsonl(path=path).problems("train")


def test_the_yaml_names_every_setting(good):
    written = OmegaConf.load(CONF_DIR / "task" / "jsonl.yaml")
    assert written.pop("_target_") == "opd_lightning.task.jsonl.Jsonl"
    written.path = good
    assert Jsonl(**written) == Jsonl(path=good)


def test_evaluation_alone_needs_no_training_file(good):
    task = Jsonl(val_path=good)
    assert len(task.problems("validation")) > 0
    with pytest.raises(ConfigError, match=r"`task.path` must be given"):
        task.problems("train")


def test_a_chat_under_prompt_is_read_as_messages(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+3?"}]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": turns, "answer": 5.0}) + "\n")
    (problem,) = Jsonl(path=str(path)).problems("train")
    assert [dict(turn) for turn in problem.messages] == turns
    assert Jsonl(path=str(path)).grade(problem, "\\boxed{5}") == 1.0
