"""Teachers made of the student: what they see, whose weights they have, and what they refuse."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
from commands.own import SUMS, save_model, shipped_tokenizer, write_rows
from commands.running import Finished, here
from hydra import compose, initialize_config_dir
from tiny import tiny_model

from opd_lightning.chat import encode, left_padded
from opd_lightning.commands import build
from opd_lightning.errors import ConfigError
from opd_lightning.loading import FrozenScorer, Loading
from opd_lightning.lora import Lora
from opd_lightning.paths import CONF_DIR
from opd_lightning.protocols import Follows
from opd_lightning.schedule import Linear
from opd_lightning.scorer import Scorer
from opd_lightning.scoring import teacher_tokens
from opd_lightning.teacher.self_teacher import AveragedScorer, LiveScorer, SelfTeacher
from opd_lightning.types import Finish, Origin, Problem, PromptBatch, Rollout, Want

TOKENIZER = shipped_tokenizer()
WIDTH = len(TOKENIZER)
CONTEXT = " The solution is {solution} and the answer is {answer}. \\boxed{}"
PROBLEMS = tuple(
    Problem(index=i, messages=messages, answer=str(i), response=f"it is {i} {{answer}}")
    for i, messages in enumerate(
        [
            [{"role": "user", "content": "one and two"}],
            [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": "a much longer one and two"},
            ],
        ]
    )
)


def teacher(**more) -> SelfTeacher:
    settings = {
        "path": "here",
        "dtype": "float32",
        "scoring_temperature": None,
        "weights": "live",
        "decay": None,
        "context": CONTEXT,
        "solution": "response",
        "max_prompt_tokens": 512,
    }
    return SelfTeacher(**settings | ({"decay": 0.5} if more.get("weights") == "ema" else {}) | more)


def loading(student: Scorer, **more) -> Loading:
    settings = {
        "student_path": "here",
        "student_dtype": "float32",
        "tokenizer": TOKENIZER,
        "vocab": WIDTH,
        "scratch_mb": 1,
        "problems": PROBLEMS,
    }
    return Loading(student=student, **settings | more)


@pytest.fixture
def student() -> Scorer:
    return Scorer(tiny_model(1, vocab=WIDTH), scratch=1 << 20).train()


@pytest.fixture
def rollout() -> Rollout:
    ids, mask = left_padded([encode(TOKENIZER, p.messages) for p in PROBLEMS])
    response = torch.tensor([[7, 9, 11, 4], [5, 6, 0, 0]])
    written = torch.tensor([[True] * 4, [True, True, False, False]])
    return Rollout(
        prompt=PromptBatch(ids=ids, mask=mask, problems=PROBLEMS, seeds=(3, 4)),
        ids=response,
        mask=written,
        origin=torch.full_like(response, Origin.STUDENT),
        horizon=torch.ones_like(written),
        behavior_logp=torch.zeros(response.shape),
        finish=torch.full((2,), int(Finish.EOS)),
        group=torch.arange(2),
    )


# -- the view


def test_the_view_changes_the_last_user_message_alone(student, rollout):
    loaded = teacher().load(loading(student))
    seen = loaded.view(rollout.prompt)
    assert (seen.problems, seen.seeds) == (rollout.prompt.problems, rollout.prompt.seeds)
    for row, problem in enumerate(PROBLEMS):
        shown = f" The solution is it is {problem.index} {{answer}} and the answer is {problem.index}. \\boxed{{}}"
        last = {"role": "user", "content": problem.messages[-1]["content"] + shown}
        wanted = encode(TOKENIZER, [*problem.messages[:-1], last])
        assert seen.ids[row][seen.mask[row]].tolist() == wanted
        assert seen.mask[row, -len(wanted) :].all()
        assert "solution" not in problem.messages[-1]["content"]
    tokens = teacher_tokens(loaded, rollout)
    assert torch.equal(tokens.ids, rollout.ids)
    assert torch.equal(tokens.mask, rollout.mask)
    assert torch.equal(tokens.prompt_ids, seen.ids)


def test_an_answer_as_the_solution(student, rollout):
    loaded = teacher(context="={solution}", solution="answer").load(loading(student))
    text = TOKENIZER.decode(loaded.view(rollout.prompt).ids[1])
    assert "=1" in text.replace(" ", "")


def test_scores_are_those_of_the_model_behind_the_privileged_prompt(student, rollout):
    loaded = teacher().load(loading(student))
    got = loaded(teacher_tokens(loaded, rollout), Want(taken=True)).taken_logp
    seen = loaded.view(rollout.prompt)
    for row in range(2):
        prompt = seen.ids[row][seen.mask[row]]
        response = rollout.ids[row][rollout.mask[row]]
        with torch.no_grad():
            logits = student.model.eval()(torch.cat([prompt, response])[None]).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(got[row][rollout.mask[row]], logp)
    plain = student(rollout.tokens, Want(taken=True)).taken_logp
    assert not torch.allclose(got[rollout.mask], plain[rollout.mask], atol=1e-2)


# -- the weights


def test_a_live_teacher_is_the_student_without_dropout_or_gradient(student, rollout):
    Lora(rank=2, alpha=4, dropout=0.5, target_modules="all-linear").add_to(student.model, 0)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    student.train()
    loaded = teacher().load(loading(student))
    assert loaded.scorer is student
    assert isinstance(loaded, LiveScorer)
    assert isinstance(loaded, Follows)
    assert loaded.to("meta").scorer.device.type == "cpu"
    first, second = (loaded(rollout.tokens, Want(taken=True)).taken_logp for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert all(module.training for module in student.modules())
    assert not torch.equal(first, student(rollout.tokens, Want(taken=True)).taken_logp), "dropout is not on"
    with torch.no_grad():
        student.model.get_input_embeddings().weight.mul_(1.1)
    assert not torch.equal(first, loaded(rollout.tokens, Want(taken=True)).taken_logp)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_the_average_is_what_the_formula_says(student, decay):
    student.double()
    loaded = teacher(weights="ema", context=None, decay=decay, dtype="float64").load(
        loading(student, student_dtype="float64")
    )
    assert isinstance(loaded, AveragedScorer)
    assert loaded.view is None
    assert not any(p.requires_grad for p in loaded.scorer.parameters())
    assert not any(module.training for module in loaded.scorer.model.modules())
    wanted = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    torch.manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        now = {name: p.detach().clone() for name, p in student.model.named_parameters()}
        loaded.follow(student, 0.0)
        wanted = {name: decay * w + (1 - decay) * now[name] for name, w in wanted.items()}
        held = dict(loaded.scorer.model.named_parameters())
        assert held.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(held[name], wanted[name], rtol=1e-13, atol=1e-13)
        assert all(torch.equal(p, now[name]) for name, p in student.model.named_parameters())


def test_the_decay_may_be_a_schedule(student):
    loaded = teacher(weights="ema", context=None, decay=Linear(start=1.0, end=0.0)).load(loading(student))
    before = [p.clone() for p in loaded.scorer.parameters()]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    for progress, share in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        loaded.follow(student, progress)
        for held, old in zip(loaded.scorer.parameters(), before, strict=True):
            torch.testing.assert_close(held - old, torch.full_like(held, share))


def test_the_average_of_a_student_with_adapters_is_the_adapters(student):
    Lora(rank=2, alpha=4, dropout=0.0, target_modules="all-linear").add_to(student.model, 0)
    loaded = teacher(weights="ema", context=None).load(loading(student))
    before = {name: p.clone() for name, p in loaded.scorer.model.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    loaded.follow(student, 0.0)
    after = dict(loaded.scorer.model.named_parameters())
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if "lora_" in name}


def test_frozen_weights_are_loaded_again(tmp_path, rollout):
    path = str(save_model(tmp_path / "student"))
    source = teacher(path=path, weights="initial")
    student = Scorer(tiny_model(1, vocab=WIDTH), scratch=1 << 20)
    loaded = source.load(loading(student, student_path=path))
    assert type(loaded) is FrozenScorer
    assert not isinstance(loaded, Follows)
    again = source.load(loading(student, student_path=path))
    assert loaded.scorer is not again.scorer
    want = Want(taken=True)
    assert torch.equal(loaded(rollout.tokens, want).taken_logp, again(rollout.tokens, want).taken_logp)


# -- refusals


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("teacher.weights", {"weights": "frozen"}),
        ("teacher.decay", {"weights": "ema", "decay": 1.5}),
        ("teacher.decay", {"weights": "ema", "decay": Linear(start=0.9, end=1.1)}),
        ("teacher.decay", {"weights": "ema", "decay": None}),
        ("teacher.decay", {"weights": "initial", "decay": 0.9}),
        ("teacher.decay", {"weights": "live", "decay": 0.9}),
        ("teacher.context", {"context": " "}),
        ("teacher.context", {"context": None}),  # and live: the teacher would be the student
        ("teacher.context", {"context": None, "weights": "initial"}),  # the student as it started
        ("teacher.solution", {"solution": "extra"}),
        ("teacher.max_prompt_tokens", {"max_prompt_tokens": 0}),
    ],
)
def test_refuses_fields(field, more):
    with pytest.raises(ConfigError, match=f"`{field}` must"):
        teacher(**more)


@pytest.mark.parametrize(
    ("says", "more", "run"),
    [
        ("`teacher.path` must be the student's", {"path": "there"}, {}),
        ("`teacher.path` must be the student's", {"path": "there", "weights": "ema"}, {}),
        ("`teacher.dtype` must be the student's", {"dtype": "bfloat16"}, {}),
        ("`teacher.dtype` must be at least float32", {"dtype": "bfloat16", "weights": "ema"}, {}),
        ("`teacher.scoring_temperature` must", {"scoring_temperature": 0.5}, {}),
        ("`teacher.max_prompt_tokens` must cover", {"max_prompt_tokens": 9}, {}),
        ("a response for {solution}", {}, {"problems": (replace(PROBLEMS[0], response=None),)}),
        ("an answer for {answer}", {}, {"problems": (replace(PROBLEMS[0], answer=None),)}),
        ("an answer for {solution}", {"solution": "answer"}, {"problems": (replace(PROBLEMS[0], answer=""),)}),
        ("a user's message", {}, {"problems": (replace(PROBLEMS[0], messages=({"role": "system", "content": "a"},)),)}),
    ],
)  # fmt: skip
def test_refuses_to_load(says, more, run, student):
    with pytest.raises(ConfigError) as refused:
        teacher(**more).load(loading(student, **run))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_generated_problem_without_a_solution_is_refused_when_it_comes(student, rollout):
    loaded = teacher().load(loading(student, problems=()))
    nameless = replace(rollout.prompt, problems=(PROBLEMS[0], replace(PROBLEMS[1], response=None)))
    with pytest.raises(ConfigError, match="got none for problem 1; add 'response' to each row"):
        loaded.view(nameless)


# -- through the command


def rows(tmp_path):
    solved = [row | {"response": f"The answer is \\boxed{{{row['answer']}}}."} for row in SUMS]
    return write_rows(tmp_path / "solved.jsonl", solved)


def train(tmp_path, *more: str, problems=None) -> Finished:
    path = problems or rows(tmp_path)
    files = [f"task.{name}={path}" for name in ("path", "val_path")]
    student = tmp_path / "student"
    if not student.exists():
        save_model(student)
    budget = ["debug=fast", "rollout.max_new_tokens=6", "evaluation.settings.max_new_tokens=6"]
    given = ["task=jsonl", *files, f"student.path={student}", *budget, *more]
    return here("train", *given, folder=tmp_path / "run")


def log_ratios(done: Finished) -> list[float]:
    with (done.folder / "metrics.csv").open() as file:
        return [float(r["teacher/log_ratio"]) for r in csv.DictReader(file) if r.get("teacher/log_ratio")]


def checkpoint_names(done: Finished) -> set[str]:
    (saved,) = done.folder.glob("checkpoints/step=*.ckpt")
    return set(torch.load(saved, weights_only=False)["state_dict"])


@pytest.mark.parametrize("weights", ["initial", "live", "ema"])
@pytest.mark.parametrize("support", ["teacher", "full"])
def test_trains_with_privileged_context(weights, support, tmp_path):
    done = train(
        tmp_path,
        "teacher=self",
        f"teacher.weights={weights}",
        *(["teacher.decay=0.999"] if weights == "ema" else []),
        f"support={support}",
        "collector.steps_per_collection=1",
    )
    assert done.summary["optimizer_steps"] == 2
    assert done.summary["teacher_accuracy"] is None
    assert "teacher_accuracy is left out" in done.out
    assert all(loss > 0 for loss in done.losses), "the context changes nothing"
    assert all(ratio != 0 for ratio in log_ratios(done))
    frozen = weights == "initial"
    assert ("frozen)" in done.out, "follows the student)" in done.out) == (frozen, not frozen)
    model = Scorer(tiny_model(vocab=WIDTH))
    assert checkpoint_names(done) == {f"student.{name}" for name in model.state_dict()}


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_trains_towards_its_average(decay, tmp_path):
    """Equal at first; equal again after a step that it follows wholly, and behind after one that it follows halfway."""
    pull = ["teacher=ema", f"teacher.decay={decay}", "collector.steps_per_collection=1", "optimizer.lr=0.1"]
    # The average alone gives no gradient at the start: something else has to move the student.
    away = [
        "regularizer=[reference_kl]",
        "reference=path",
        f"reference.path={save_model(tmp_path / 'r', seed=5)}",
    ]
    done = train(tmp_path, *pull, *away)
    first, second = log_ratios(done)
    assert first == 0
    assert abs(second) < 1e-5 if decay == 0 else abs(second) > 1e-4
    assert done.summary["teacher_accuracy"] is not None
    model = Scorer(tiny_model(vocab=WIDTH))
    assert checkpoint_names(done) == {f"student.{name}" for name in model.state_dict()}


def test_a_scheduled_decay_reads_the_clock_of_the_run(tmp_path):
    """The first of two steps is done at progress 0, so that the average stays where it started."""
    switch = "{_target_: opd_lightning.schedule.Step, before: 1.0, after: 0.0, at: 0.5}"
    words = ["teacher=ema", f"teacher.decay={switch}", "collector.steps_per_collection=1", "optimizer.lr=0.1"]
    away = ["regularizer=[reference_kl]", "reference=path"]
    done = train(tmp_path, *words, *away, f"reference.path={save_model(tmp_path / 'r', seed=5)}")
    first, second = log_ratios(done)
    assert first == 0
    assert abs(second) > 1e-4


def test_a_preset_leaves_the_teachers_weights_to_the_teacher():
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        averaged, own = (compose("train", ["experiment=opsd", f"teacher={t}"]) for t in ("ema", "self"))
    assert (averaged.teacher.weights, build(averaged.teacher).decay) == ("ema", 0.999)
    assert build(own.teacher).weights == "initial"


@pytest.mark.parametrize(
    ("says", "more"),
    [
        ("`collector.steps_per_collection` must be 1", ["teacher=ema", "support=full"]),
        ("`teacher.dtype` must be at least float32", ["teacher=ema", "student.dtype=bfloat16"]),
    ],
)
def test_refuses_what_cannot_be(says, more, tmp_path):
    assert says in train(tmp_path, *more).sentence


def test_refuses_rows_without_a_solution(tmp_path, sums):
    sentence = train(tmp_path, "teacher=self", problems=sums).sentence
    assert "a response for {solution} of teacher.context, got none for problem 0" in sentence
    done = train(tmp_path, "teacher=self", "teacher.solution=answer", problems=sums)
    assert len(done.losses) == 2


@pytest.fixture
def sums(tmp_path):
    return write_rows(tmp_path / "sums.jsonl", SUMS)
