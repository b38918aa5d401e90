"""``teacher=router`` as a command: a column of the data names each row's teacher."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from commands.own import SUMS, save_model, write_rows
from commands.running import Finished, here

SMALL = [
    "debug=fast",
    "rollout.max_new_tokens=6",
    "evaluation.settings.max_new_tokens=6",
    "evaluation.settings.samples=0",
]


FAR = "+teacher@teacher"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A student, two teachers, and sums whose column ``source`` names one of them."""
    folder = tmp_path_factory.mktemp("own")
    for seed, name in enumerate(("student", "plus", "minus")):
        save_model(folder / name, seed=seed, vocab=448 + 8 * seed)
    named = ("plus", "plus", "minus", "plus", "minus", "sums")
    write_rows(folder / "rows.jsonl", [row | {"source": name} for row, name in zip(SUMS, named, strict=True)])
    return folder


def train(own: Path, folder: Path, *more: str) -> Finished:
    data = ["task=jsonl", f"task.path={own / 'rows.jsonl'}", f"student.path={own / 'student'}"]
    return here("train", *SMALL, *data, *more, folder=folder)


def metrics(done: Finished) -> list[dict[str, float]]:
    """The rows of the optimizer steps, but for what the clock says."""
    with (done.folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    timed = ("time/", "throughput/")
    return [{k: float(v) for k, v in row.items() if v and not k.startswith(timed)} for row in rows]


def test_each_row_is_scored_by_the_teacher_that_it_names(own, tmp_path):
    """Six rows in each pass of eight; the value sums leads to plus, by a route."""
    by_path = [
        f"+teacher.teachers.plus={own / 'plus'}",
        "teacher.default=null",
        "teacher.routes={sums: plus}",
    ]
    by_option = ["+teacher@teacher.teachers.minus=builtin", f"teacher.teachers.minus.path={own / 'minus'}"]
    done = train(own, tmp_path / "run", "teacher=router", "teacher.column=source", *by_path, *by_option)
    assert "teacher   by source (minus, plus)" in done.out
    first, *_ = metrics(done)
    assert first["teacher/plus/share"] + first["teacher/minus/share"] == 1
    assert 0 < first["teacher/minus/share"] < first["teacher/plus/share"]
    assert {
        f"teacher/{name}/{q}" for name in ("plus", "minus") for q in ("accuracy", "logp", "entropy")
    } < first.keys()
    assert first["teacher/plus/logp"] != first["teacher/minus/logp"]
    assert done.summary["model_tflops"]["score"] > 0


def test_a_router_of_one_teacher_gives_its_losses(own, tmp_path):
    """Bit by bit, and all metrics that both have; a dictionary needs no plus where there is none yet."""
    alone = train(own, tmp_path / "alone", f"teacher.path={own / 'plus'}")
    words = [f"teacher.teachers={{plus: {own / 'plus'}}}", "teacher.routes={minus: plus, sums: plus}"]
    routed = train(
        own, tmp_path / "routed", "teacher=router", "teacher.column=source", "teacher.default=null", *words
    )
    assert routed.losses == alone.losses
    assert len(set(alone.losses)) == 2
    for one, other in zip(metrics(alone), metrics(routed), strict=True):
        assert {k: v for k, v in other.items() if not k.startswith("teacher/plus/")} == one
        if "teacher/logp" in one:
            assert other["teacher/plus/logp"] == one["teacher/logp"]
            assert other["teacher/plus/accuracy"] == one["rollout/accuracy"]


def test_the_option_alone_is_the_built_in_teacher(tmp_path):
    done = here("train", *SMALL, "teacher=router", folder=tmp_path / "run")
    assert metrics(done)[0]["teacher/default/share"] == 1.0


@pytest.mark.usefixtures("models_stay_closed")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["teacher.default=null"], "`teacher.teachers` must hold a teacher"),
        (["teacher.default=null", "+teacher.teachers.plus=P"], "got no difficulty in problem 0; use one of plus"),
        (["+teacher.teachers.plus=P"], "`teacher.column` must name one of plus in some row, got 'difficulty'"),
        (["+teacher.teachers.plus=P", "support=full"], "`support` must be selected ids with a served, cached, routed"),
        (["+teacher.teachers.plus=nowhere/at/all"], "`teacher.teachers.plus` must be a folder with a model"),
        ([f"{FAR}.teachers.far=served", "teacher.teachers.far.address=far"], "`teacher.teachers.far.address` must"),
        ([f"{FAR}.default=served", "teacher.default.timeout_s=0"], "error: `teacher.default.timeout_s` must be"),
        (["teacher.teachers.plus=P"], "`teacher.teachers.plus` must be set with a plus, as a name of your own"),
        (["+teacher.teachers.plus=P", "teacher.routes={sums: pluss}"], "`teacher.routes` must lead each value to one"),
    ],
)  # fmt: skip
def test_refusals_before_a_model_is_opened(own, tmp_path, words, sentence):
    words = [word.replace("=P", f"={own / 'plus'}") for word in words]
    assert sentence in train(own, tmp_path / "run", "teacher=router", *words).sentence


@pytest.mark.usefixtures("models_stay_closed")
def test_a_row_that_names_no_teacher_is_named(own, tmp_path):
    words = ["teacher.column=source", "teacher.default=null", f"+teacher.teachers.plus={own / 'plus'}"]
    said = train(own, tmp_path / "run", "teacher=router", *words).sentence
    assert (
        "`teacher.column` must name a teacher in every row, got source='minus' in problem 2; use one of plus"
        in said
    )


def test_no_teacher_of_a_router_writes(own, tmp_path):
    words = [
        "teacher=router",
        f"teacher.default={own / 'plus'}",
        "rollout=teacher_prefix",
        "rollout.text=teacher",
    ]
    assert (
        "`rollout` must have one teacher in this process to write"
        in train(own, tmp_path / "run", *words).sentence
    )
