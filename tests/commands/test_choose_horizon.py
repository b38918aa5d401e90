"""``python -m opd_lightning.choose_horizon``: the curve, the N, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex

import pytest
import torch

from commands.own import save_model, write_rows
from commands.running import here
from opd_lightning.choose_horizon import next_command
from opd_lightning.diagnostics.horizon import DivergenceByPosition
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.models import load_model, load_tokenizer

STUDENT, TEACHER = (f"builtin:word_problems/{role}" for role in ("student", "teacher"))
NAN = math.nan


def on(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def found_of(*rows):
    """Rows of divergences, of different lengths, added one by one."""
    found = DivergenceByPosition()
    for row in rows:
        found = found.add(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))
    return found


class TestTheCurve:
    # Sums by position: 6, 3, 0, 3 over three responses of 1, 2 and 4 tokens.
    ROWS = ([2.0], [3.0, 1.0], [1.0, 2.0, 0.0, 3.0])

    def test_by_hand(self):
        found = found_of(*self.ROWS)
        assert found.responses == 3
        assert found.tokens.tolist() == [3, 2, 1, 1]
        assert found.mean.tolist() == [2.0, 1.5, 0.0, 3.0]
        assert found.cumulative.tolist() == [2.0, 3.0, 3.0, 4.0]
        assert found.share.tolist() == [0.5, 0.75, 0.75, 1.0]

    def test_n_is_the_first_place_that_reaches_the_share(self):
        found = found_of(*self.ROWS)
        asked = {0.01: 1, 0.45: 1, 0.5: 1, 0.51: 2, 0.75: 2, 0.76: 4, 1.0: 4}
        assert {share: found.horizon(share) for share in asked} == asked

    def test_batches_and_padding_change_nothing(self):
        wide = torch.tensor(
            [[2.0, NAN, NAN, NAN, NAN], [3.0, 1.0, math.inf, NAN, NAN], [1.0, 2.0, 0.0, 3.0, NAN]]
        )
        mask = on([1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0])
        at_once = DivergenceByPosition().add(wide, mask)
        assert at_once.cumulative.tolist() == [2.0, 3.0, 3.0, 4.0, 4.0]
        in_two = DivergenceByPosition().add(wide[2:], mask[2:]).add(wide[:2, :2], mask[:2, :2])
        assert torch.equal(in_two.cumulative, at_once.cumulative)
        assert (in_two.responses, in_two.horizon(0.75)) == (3, 2)

    def test_every_share_is_reached(self):
        """Rounding must not leave the last position short of 1."""
        draw = torch.Generator().manual_seed(0)
        for length in range(1, 60):
            found = found_of(torch.rand(length, generator=draw).tolist())
            assert found.horizon(1.0) == length

    def test_positions_to_show(self):
        for last in (1, 2, 11, 37, 100, 128, 999, 8192):
            shown = found_of([1.0] * last).positions(also=min(7, last))
            assert {1, last, min(7, last)} <= set(shown)
            assert shown == sorted(set(shown))
            assert min(last, 8) <= len(shown) <= 20

    @pytest.mark.parametrize("rows", [[], [[0.0, 1e-9]], [[0.0]]])
    def test_nothing_to_share_out(self, rows):
        with pytest.raises(ConfigError, match=r"`teacher.path` must diverge from the student"):
            found_of(*rows).horizon(0.45)


def by_hand(student, teacher, prompts, responses):
    """Sum by position of sum_v S (log S - log T), from the library's own logits, response by response."""
    sums = [0.0] * max(map(len, responses))
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            s, t = (
                m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (student, teacher)
            )
        for n, value in enumerate((s.exp() * (s - t)).sum(-1).tolist()):
            sums[n] += value
    return sums


def test_the_built_in_pair(tmp_path, monkeypatch):
    """Table, json and csv against the two models' own logits."""
    drawn = []
    original = TransformersEngine.generate

    def watched(self, model, prompts, sampling):
        generation = original(self, model, prompts, sampling)
        for row in range(len(prompts)):
            prompt = prompts.ids[row][prompts.mask[row]].tolist()
            drawn.append((prompt, generation.ids[row][generation.mask[row]].tolist()))
        assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.7, 0.95, 40)
        return generation

    monkeypatch.setattr(TransformersEngine, "generate", watched)
    settings = ["rollouts=6", "batch=4", "max_new_tokens=40", "share=0.3"]
    done = here("choose_horizon", *settings, folder=tmp_path / "run")
    assert done.code == 0, done.err
    assert len(drawn) == 6
    assert len({tuple(prompt) for prompt, _ in drawn}) == 6

    models = [load_model(path, "path").eval() for path in (STUDENT, TEACHER)]
    sums = by_hand(*models, *zip(*drawn, strict=True))
    with (done.folder / "horizon.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [row["position"] for row in rows] == list(range(1, len(sums) + 1))
    cumulative = torch.tensor(sums, dtype=torch.float64).cumsum(0) / 6
    assert [row["cumulative_divergence"] for row in rows] == pytest.approx(
        cumulative.tolist(), rel=1e-4, abs=1e-5
    )
    reach = [sum(len(r) > n for _, r in drawn) for n in range(len(sums))]
    assert [row["responses"] for row in rows] == reach

    result = json.loads((done.folder / "horizon.json").read_text())
    n = result["horizon"]
    shares = (cumulative / cumulative[-1]).tolist()
    assert shares[n - 1] >= 0.3 > (shares[n - 2] if n > 1 else 0.0)
    assert result["mean_length"] == pytest.approx(sum(reach) / 6)
    assert f"N = {n}:" in done.out
    assert result["next"] == f"python -m opd_lightning.train rollout=esr rollout.max_new_tokens={n}"
    assert f"next: {result['next']}\n" in done.out
    cells = [
        [c.strip() for c in line.split("│")[1:-1]] for line in done.out.splitlines() if line.startswith("│")
    ]
    assert {"1", str(n), str(len(sums))} <= {row[0] for row in cells}
    for number, responses, mean, first, share in cells:
        row = rows[int(number) - 1]
        assert int(responses) == row["responses"]
        assert float(mean) == pytest.approx(row["mean_divergence"], abs=1e-4)
        assert float(first) == pytest.approx(row["cumulative_divergence"], abs=1e-3)
        assert share == f"{row['cumulative_share']:.1%}"


def test_its_command_trains(tmp_path):
    """With the same models and task: what it prints is run as it stands, but for its size."""
    student, teacher = (save_model(tmp_path / f"model {seed}", seed=seed) for seed in (0, 1))
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"Say {word}."} for word in ("a", "b", "c")])
    chosen = ["task=jsonl", f"task.path={file}", f"student.path={student}", f"teacher.path={teacher}"]
    done = here(
        "choose_horizon", *chosen, "rollouts=5", "max_new_tokens=12", "top_p=1", folder=tmp_path / "run"
    )
    assert done.code == 0, done.err
    printed = re.search(r"^next: (.*)$", done.out, re.MULTILINE)[1]
    python, _, module, *words = shlex.split(printed)
    assert (python, module) == ("python", "opd_lightning.train")
    assert words[0] == "rollout=esr"
    assert words[2:] == [*chosen, "rollout.top_p=1"]
    n = int(words[1].partition("=")[2])
    small = ["debug=fast", "callbacks=[]", "logger=[csv]", "evaluation.teacher=false", words[1]]
    trained = here("train", *words, *small, folder=tmp_path / "train")
    assert trained.code == 0, trained.err
    # one response a prompt, 8 prompts, at most N tokens each
    assert 0 < trained.summary["response_tokens"] <= 8 * n


def test_the_same_seed_draws_the_same(tmp_path):
    models = [
        f"{role}.path={save_model(tmp_path / role, seed=i)}" for i, role in enumerate(("student", "teacher"))
    ]
    runs = {}
    for name, seed, batch in (("a", 0, 3), ("b", 0, 4), ("c", 1, 4)):
        settings = [*models, "rollouts=4", "max_new_tokens=10", f"seed={seed}", f"batch={batch}"]
        done = here("choose_horizon", *settings, folder=tmp_path / name)
        assert done.code == 0, done.err
        runs[name] = json.loads((done.folder / "horizon.json").read_text())["mean_divergence"]
    assert runs["a"] == pytest.approx(runs["b"], rel=1e-5)
    assert abs(runs["a"] - runs["c"]) > 1e-3 * runs["a"]


def test_overrides_that_the_next_command_keeps():
    given = [
        "+task.x=1",
        "student/lora=none",
        "engine.method=loop",
        "share=0.5",
        "rollouts=9",
        "temperature=1.0",
    ]
    words = shlex.split(next_command(3, [*given, "max_prompt_tokens=9", "hydra.verbose=true"]))[3:]
    assert words[2:] == [*given[:3], "rollout.temperature=1.0", "collector.max_prompt_tokens=9"]


FORM = re.compile(r"error: `(?P<field>[\w.]+)` must .+, got .+; .+")
REFUSED = [
    (["share=0"], "share", "in (0, 1], got 0"),
    (["share=1.5"], "share", "got 1.5"),
    (["rollouts=0"], "rollouts", "at least 1, got 0"),
    (["batch=some"], "batch", "got 'some'"),
    (["temperature=0"], "temperature", "above 0"),
    (["top_p=2"], "top_p", "in (0, 1]"),
    (["max_new_tokens=0"], "max_new_tokens", "got 0"),
    (["seed=-1"], "seed", "got -1"),
    (["split=wrong"], "split", "got 'wrong'"),
    (["accelerator=tpu"], "accelerator", "got 'tpu'"),
    (["student.head_scratch_mb=0"], "student.head_scratch_mb", "got 0"),
    (["student.scoring_temperature=0"], "student.scoring_temperature", "above 0"),
    (["student.compile=layers"], "student.compile", "got 'layers'"),
    (["student.layout=dense"], "student.layout", "got 'dense'"),
    (["student.dtype=int8"], "student.dtype", "got 'int8'"),
    (["teacher.dtype=int8"], "teacher.dtype", "got 'int8'"),
    (["teacher.path=/nowhere"], "teacher.path", "got '/nowhere'"),
    (["max_prompt_tokens=0"], "max_prompt_tokens", "got 0"),
    (["+nonsense=1"], "nonsense", "unknown"),
    (["rollout=esr"], "rollout", "unknown"),
    (["+student.nonsense=1"], "student.nonsense", "unknown"),
]


@pytest.mark.usefixtures("models_stay_closed")
@pytest.mark.parametrize(
    ("arguments", "field", "says"), REFUSED, ids=lambda x: x[0] if isinstance(x, list) else None
)
def test_refusals(arguments, field, says, tmp_path):
    sentence = here("choose_horizon", *arguments, folder=tmp_path / "run").sentence
    found = FORM.fullmatch(sentence)
    assert found, sentence
    assert found["field"] == field
    assert says in sentence


def test_a_teacher_that_is_the_student(tmp_path):
    settings = [f"teacher.path={STUDENT}", "rollouts=2", "max_new_tokens=8"]
    done = here("choose_horizon", *settings, folder=tmp_path / "run")
    assert "`teacher.path` must diverge from the student" in done.sentence
    assert not (tmp_path / "run" / "horizon.json").exists()


def test_the_shipped_models_share_a_tokenizer():
    """What the by-hand comparison relies on: no ids beyond the shared width."""
    assert load_tokenizer(STUDENT, "path").get_vocab() == load_tokenizer(TEACHER, "path").get_vocab()
