"""``python -m opd_lightning.evaluate``: its table and json against numbers worked out by hand from the responses."""

from __future__ import annotations

import itertools
import json
import re
from statistics import mean

import pytest

from commands.own import SUMS, save_model, write_rows
from commands.running import here
from opd_lightning.collector import respond_and_grade
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.models import load_model, load_tokenizer, stop_ids
from opd_lightning.prompts import Prompts
from opd_lightning.task.jsonl import Jsonl
from opd_lightning.task.word_problems import WordProblems
from opd_lightning.types import Sampling

STUDENT = "builtin:word_problems/student"
PROBLEMS = 8
BUDGET = 90  # tokens; some responses are longer


def responses(task, path, samples, temperature):
    """Return (difficulty, grades, lengths, truncations, repetitions) of each problem, all drawn in one batch."""
    tokenizer, model = load_tokenizer(path, "student.path"), load_model(path, "student.path")
    prompts = Prompts(
        problems=task.problems("validation"), tokenizer=tokenizer, max_tokens=512, long="drop", seed=0
    )
    sampling = Sampling(max_new_tokens=BUDGET, temperature=temperature, stop_ids=stop_ids(model, tokenizer))
    asked = prompts.first(range(min(PROBLEMS, len(prompts)))).repeat(samples)
    graded = respond_and_grade(task, tokenizer, TransformersEngine(), model, asked, sampling)
    measured = graded.correct, graded.lengths, graded.truncated, graded.repetition
    columns = [values.tolist() for values in measured]
    parts = [[c[i : i + samples] for c in columns] for i in range(0, len(asked), samples)]
    return [(graded.difficulty[i * samples], *part) for i, part in enumerate(parts)]


def by_hand(problems, samples):
    """Return the metrics of some problems: pass@k is the mean over all choices of k samples of whether one is right."""
    numbers = {
        "responses": len(problems) * samples,
        "accuracy": mean(mean(grades) for _, grades, *_ in problems),
        "length": mean(mean(lengths) for _, _, lengths, *_ in problems),
        "truncation": mean(mean(cut) for *_, cut, _ in problems),
        "repetition": mean(mean(shares) for *_, shares in problems),
        "repetitive": 0.0,  # none is 10,000 characters long
    }
    numbers["pass@1"] = numbers[f"avg@{samples}"] = numbers["accuracy"]
    for k in range(2, samples + 1):
        if k in (2, 4, 8, samples):
            numbers[f"pass@{k}"] = mean(
                mean(max(chosen) for chosen in itertools.combinations(grades, k))
                for _, grades, *_ in problems
            )
    return numbers


@pytest.mark.parametrize(("samples", "temperature"), [(1, 0.0), (4, 1.0), (3, 1.0)], ids=["greedy", "4", "3"])
def test_json_and_table(samples, temperature, tmp_path):
    """For all problems and for each difficulty; generated in batches of another size."""
    settings = [
        f"samples={samples}",
        f"temperature={temperature}",
        f"problems={PROBLEMS}",
        f"max_new_tokens={BUDGET}",
    ]
    done = here("evaluate", *settings, "batch=3", folder=tmp_path / "run")
    drawn = responses(WordProblems(), STUDENT, samples, temperature)
    assert {cut for *_, cuts, _ in drawn for cut in cuts} == {True, False}
    groups = {"all": drawn}
    for problem in drawn:
        groups.setdefault(problem[0], []).append(problem)
    metrics = done.summary["metrics"]
    assert list(metrics) == ["all", *sorted(groups.keys() - {"all"})]
    for name, problems in groups.items():
        assert metrics[name] == pytest.approx(by_hand(problems, samples), rel=1e-6)

    header, *rows = [
        re.split(r"[│┃]", line)[1:-1] for line in done.out.splitlines() if line[:1] in ("│", "┃")
    ]
    names = [f"pass@1 (avg@{samples})", "length", "truncation", "repetition", "repetitive"]
    assert [cell.strip() for cell in header][2:7] == names
    assert [cell.strip() for cell in header][7:] == [
        f"pass@{k}" for k in range(2, samples + 1) if k in (2, 4, samples)
    ]
    assert [row[0].strip() for row in rows] == list(metrics)
    for row, (_, numbers) in zip(rows, metrics.items(), strict=True):
        shown = dict(zip((cell.strip() for cell in header), (cell.strip() for cell in row), strict=True))
        assert shown["responses"] == str(numbers["responses"])
        assert shown["length"] == f"{numbers['length']:.1f}"
        assert shown[f"pass@1 (avg@{samples})"] == f"{numbers['accuracy']:.1%}"
    assert str(done.folder / "evaluation.json") in done.out


def test_what_the_json_says_of_the_run(tmp_path):
    model = save_model(tmp_path / "model")
    done = here(
        "evaluate",
        f"student.path={model}",
        "problems=2",
        "max_new_tokens=4",
        "seed=3",
        folder=tmp_path / "run",
    )
    expected = {
        "student": str(model),
        "split": "validation",
        "problems": 2,
        "samples": 1,
        "temperature": 0.0,
        "seed": 3,
    }
    assert {name: done.summary[name] for name in expected} == expected
    assert done.summary["task"]["_target_"].endswith("WordProblems")
    assert {"top_p", "top_k", "min_p", "max_new_tokens", "seconds", "git_commit"} <= done.summary.keys()


def test_many_samples_keep_their_numbers_whole(tmp_path):
    """A table written to a file is not squeezed into 80 columns."""
    model = save_model(tmp_path / "model")
    settings = ["problems=2", "samples=16", "temperature=1.0", "max_new_tokens=2"]
    done = here("evaluate", f"student.path={model}", *settings, folder=tmp_path / "run")
    (header,) = [line for line in done.out.splitlines() if line.startswith("┃")]
    assert all(f"pass@{k}" in header for k in (1, 2, 4, 8, 16))
    assert "…" not in done.out


def test_own_problems_by_difficulty(tmp_path):
    """Rows without an answer count for lengths alone; a group of them has no accuracy at all."""
    model = save_model(tmp_path / "model")
    rows = [{**row, "difficulty": "easy"} for row in SUMS[:2]]
    rows += [{"prompt": "Write a poem.", "difficulty": "open"}, {"prompt": "Why?"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    settings = [f"task.{name}={file}" for name in ("path", "val_path")] + ["max_new_tokens=4"]
    done = here("evaluate", "task=jsonl", f"student.path={model}", *settings, folder=tmp_path / "run")
    metrics = done.summary["metrics"]
    assert {name: numbers["responses"] for name, numbers in metrics.items()} == {
        "all": 4,
        "easy": 2,
        "open": 1,
    }
    assert "accuracy" not in metrics["open"]
    assert "pass@1" not in metrics["open"]
    assert metrics["all"]["accuracy"] == metrics["easy"]["accuracy"] == 0.0
    assert Jsonl(path=str(file)).problems("train")[2].answer is None


def test_a_seed_decides_what_is_sampled(tmp_path):
    model = save_model(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 40))}))
    lengths = []
    for number, seed in enumerate((0, 0, 1)):
        settings = ["problems=4", "samples=2", "temperature=1.0", "max_new_tokens=40", f"seed={seed}"]
        done = here("evaluate", f"student.path={model}", *settings, folder=tmp_path / str(number))
        lengths.append(done.summary["metrics"]["all"]["length"])
    assert lengths[0] == lengths[1] != lengths[2]
    assert 1 < lengths[0] < 40


def test_a_trained_student_is_evaluated_as_at_the_end_of_its_run(tmp_path):
    """The folder that training leaves goes straight into the command."""
    budget = ["evaluation.settings.problems=4", f"evaluation.settings.max_new_tokens={BUDGET}"]
    trained = here(
        "train", "debug=fast", *budget, "evaluation.teacher=false", "callbacks=[]", folder=tmp_path / "train"
    )
    last = trained.summary["evaluations"]["2"]
    folder = trained.folder / "student"
    settings = [f"student.path={folder}", "problems=4", f"max_new_tokens={BUDGET}"]
    metrics = here("evaluate", *settings, folder=tmp_path / "run").summary["metrics"]["all"]
    assert metrics["length"] == last["eval/length"]
    assert metrics["accuracy"] == last["eval/accuracy"]
    assert metrics["truncation"] == last["eval/truncation"]
