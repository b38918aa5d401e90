"""A teacher for each row: every row is scored by its own, in any order, and what cannot be routed is refused."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from commands.own import save_model, shipped_tokenizer
from serving.servers import a_bench, serving
from tiny import random_rollout, tiny_model

from opd_lightning.diagnostics.collection import describe
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.topk import TopK
from opd_lightning.loading import FrozenScorer, Loading, scorers_of
from opd_lightning.models import load_model
from opd_lightning.objective import Objective
from opd_lightning.protocols import Follows
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.scorer import Scorer
from opd_lightning.scoring import ScoringPass, teacher_tokens
from opd_lightning.serving.client import Connection
from opd_lightning.support.student import StudentTopK
from opd_lightning.support.teacher import TeacherTopK
from opd_lightning.support.union import Union
from opd_lightning.teacher.local import LocalTeacher
from opd_lightning.teacher.routed import RoutedScorer, Routing
from opd_lightning.teacher.router import Router
from opd_lightning.teacher.self_teacher import AveragedScorer, SelfTeacher
from opd_lightning.teacher.served import ServedTeacher
from opd_lightning.teacher.vllm_server import VllmScorer, VllmTeacher
from opd_lightning.types import Experience, Graded, Origin, Problem, Rollout, Scores, Want
from opd_lightning.world import World
from opd_lightning.writing import writers_for

SHARED = 40
ROWS = 7
WANT = Want(taken=True, entropy=True, support="exact", top=5)
SOURCES = ("math", "code", "code", "math", "code", "math", "math")


def scorer(seed: int, **sizes: int) -> FrozenScorer:
    return FrozenScorer(Scorer(tiny_model(seed, **sizes).eval().requires_grad_(False), SHARED))


TEACHERS = {"math": scorer(1), "code": scorer(2, vocab=60, hidden=16)}
ELSEWHERE = VllmScorer(
    connection=Connection(address="http://127.0.0.1:9", token=None, timeout_s=1, patience_s=0, owner="teacher.address"),
    model="m",
    context=64,
    vocab=SHARED,
    tokens=64,
)  # fmt: skip


def routed_by(teachers: dict, **routes: str) -> RoutedScorer:
    return RoutedScorer(
        teachers=teachers,
        routing=Routing(column="source", routes=routes, names=tuple(teachers)),
        fields={name: f"teacher.teachers.{name}" for name in teachers},
    )


def rollout(sources=SOURCES) -> Rollout:
    """Ragged responses to problems that name these sources."""
    drawn = random_rollout(len(sources), vocab=SHARED)
    problems = tuple(
        Problem(index=i, messages=(), extra={} if source is None else {"source": source})
        for i, source in enumerate(sources)
    )
    return replace(drawn, prompt=replace(drawn.prompt, problems=problems))


def objective(support) -> Objective:
    estimator = TopK(divergence=ReverseKL(), form="renormalised")
    return Objective(estimator=estimator, support=support, reduction=TokenMean())


def collected(teacher, support, rolled: Rollout, rows: int = 2) -> tuple[Experience, torch.Tensor]:
    """What is collected of a rollout, and the loss of the step."""
    student, whole = Scorer(tiny_model(3).eval(), SHARED), objective(support)
    with torch.no_grad():
        scoring = ScoringPass(teacher=teacher, reference=None, objective=whole, rows=rows)
        experience = whole.finish(scoring(student, rolled), World())
        scores = student(rolled.tokens, whole.want, experience.support_ids)
    return experience, whole.loss(scores, experience, 0.0)[0]


def tensors(value) -> dict[str, torch.Tensor]:
    every = {f.name: getattr(value, f.name) for f in fields(value)}
    return {name: tensor for name, tensor in every.items() if isinstance(tensor, torch.Tensor)}


def assert_same(found: Scores, wanted: Scores) -> None:
    """Equal to rounding: another company is another shape."""
    torch.testing.assert_close(tensors(found), tensors(wanted), atol=2e-5, rtol=1e-5)


# -- scores


@pytest.mark.parametrize(
    "support", [TeacherTopK(k=4), StudentTopK(k=4), Union(k=4)], ids=lambda s: type(s).__name__
)
def test_a_router_with_one_teacher_is_that_teacher(support):
    """Bit by bit, the loss too."""
    rolled, (alone,) = rollout(["math"] * ROWS), [TEACHERS["math"]]
    routed, loss = collected(routed_by({"math": alone}), support, rolled)
    plain, expected = collected(alone, support, rolled)
    found, wanted = tensors(routed), tensors(plain)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(loss, expected)
    assert loss > 0


@pytest.mark.parametrize("order", [range(ROWS), [6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 2, 5, 1, 4]], ids=str)
def test_each_row_has_the_scores_of_its_own_teacher(order):
    """Models of other widths and hidden sizes, ragged rows, a teacher without a row; alone as in any company."""
    rolled = rollout().rows(list(order))
    given = torch.randint(0, SHARED, (*rolled.ids.shape, 3), generator=torch.Generator().manual_seed(0))
    routed = routed_by(TEACHERS | {"nobody": scorer(9)}).routed(rolled.prompt)
    scores = routed(rolled.tokens, WANT, given)
    for row, place in enumerate(order):
        own = TEACHERS[SOURCES[place]](rolled.tokens.rows([row]), WANT, given[[row]])
        assert_same(scores.rows([row]), own)
    assert tensors(scores).keys() == {"taken_logp", "support_logp", "entropy", "top_ids", "top_logp"}


def test_a_scoring_pass_keeps_rows_with_their_teachers():
    """It sorts rows by length and scores a few at a time."""
    rolled = rollout()
    experience, _ = collected(routed_by(TEACHERS), TeacherTopK(k=4), rolled, rows=2)
    for row, source in enumerate(SOURCES):
        own = TEACHERS[source](rolled.tokens.rows([row]), Want(taken=True, entropy=True))
        torch.testing.assert_close(experience.teacher_taken_logp[[row]], own.taken_logp, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(experience.teacher_entropy[[row]], own.entropy, atol=2e-5, rtol=1e-5)


def test_a_teacher_without_a_row_is_not_asked():
    """That one is behind an address where nobody answers; and what it never says is said of no row."""
    rolled = rollout(["math"] * ROWS)
    routed = routed_by({"math": TEACHERS["math"], "code": ELSEWHERE})
    assert not routed.scores_given_ids
    assert routed_by(TEACHERS).scores_given_ids
    experience, _ = collected(routed, TeacherTopK(k=4), rolled)
    assert experience.teacher_entropy is None
    with pytest.raises(
        ConfigError, match=r"^`teacher\.teachers\.code\.address` must name a server that answers"
    ):
        collected(routed, TeacherTopK(k=4), rollout())


def test_hidden_states_are_refused():
    with pytest.raises(ConfigError, match="`support` must be selected ids with teacher=router"):
        routed_by(TEACHERS).routed(rollout().prompt)(rollout().tokens, Want(hidden=True))
    with pytest.raises(ConfigError, match="must be told the prompts"):
        routed_by(TEACHERS)(rollout().tokens, Want(taken=True))


# -- routes


def test_a_value_is_a_name_or_leads_to_one():
    def place(routing: Routing, **row) -> int:
        return routing(Problem(index=3, messages=(), **row))

    plain = Routing(column="source", routes={"gsm8k": "math", "1": "code"}, names=("math", "code"))
    assert [place(plain, extra={"source": value}) for value in ("math", "code", "gsm8k", 1)] == [0, 1, 0, 1]
    assert place(replace(plain, column="difficulty"), difficulty="code") == 1
    with_default = replace(plain, names=("math", "code", "default"))
    rows = [{"extra": {"source": "physics"}}, {"extra": {"source": None}}, {}, {"extra": {"source": "math"}}]
    assert [place(with_default, **row) for row in rows] == [2, 2, 2, 0]
    for row, got in zip(rows[:3], ("source='physics'", "no source", "no source"), strict=True):
        with pytest.raises(ConfigError) as refusal:
            place(plain, **row)
        assert f"in every row, got {got} in problem 3; use one of math, code" in str(refusal.value)


def router(**more) -> Router:
    settings = {"column": "source", "teachers": {"math": "a", "code": "b"}, "routes": {}, "default": None}
    return Router(**settings | {"dtype": "float32"} | more)


def test_teachers_by_name():
    made = router(teachers={1: "a", "served": SERVED, "left out": None}, default="c")
    assert made.sources == {
        "1": LocalTeacher(path="a", dtype="float32"),
        "served": SERVED,
        "default": LocalTeacher(path="c", dtype="float32"),
    }
    assert made.path == f"a, {SERVED.address}, c"


SERVED = ServedTeacher(
    address="http://127.0.0.1:9", token_env="NO_TOKEN", timeout_s=1.0, patience_s=0.0, tokens_per_request=999
)


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("teacher.column", {"column": ""}),
        ("teacher.dtype", {"dtype": "int8"}),
        ("teacher.teachers", {"teachers": {}}),
        ("teacher.teachers", {"teachers": "a"}),
        ("teacher.teachers", {"teachers": {"default": "a"}}),
        ("teacher.teachers.math", {"teachers": {"math": {"path": "a"}}}),
        ("teacher.teachers.math", {"teachers": {"math": router()}}),
        ("teacher.routes", {"routes": {"gsm8k": "maths"}}),
        ("teacher.routes", {"routes": ["math"]}),
    ],
)
def test_refuses_fields(field, more):
    with pytest.raises(ConfigError, match=f"`{field}` must"):
        router(**more)


def test_problems_are_looked_at_before_anything_is_loaded(caplog):
    known = rollout().prompt.problems
    with caplog.at_level("INFO"):
        router(teachers={"math": "a", "code": "b", "law": "c"}).check_problems(known)
    assert "no row of 7 names teacher law" in caplog.text
    assert "math 4, code 3" in caplog.text
    with pytest.raises(ConfigError, match="got no source in problem 2;"):
        router().check_problems(rollout(["math", "code", None]).prompt.problems)
    with pytest.raises(
        ConfigError, match=r"`teacher\.column` must name one of math, code in some row, got 'sorce'"
    ):
        router(column="sorce", default="c").check_problems(known)
    router(teachers={}, default="c").check_problems(known)


# -- loading


def loading(student: Scorer, path: str = "here") -> Loading:
    return Loading(
        student=student,
        student_path=path,
        student_dtype="float32",
        tokenizer=shipped_tokenizer(),
        vocab=student.vocab,
        scratch_mb=1,
    )


def test_teachers_of_any_kind_share_the_narrowest_vocabulary(tmp_path):
    """One is a folder and one behind a server; both say what they say alone."""
    folder = save_model(tmp_path / "a", seed=4, vocab=460)
    tokenizer = shipped_tokenizer()
    rolled = rollout()
    with serving(a_bench(tiny_model(5, vocab=448))) as (address, _):
        served = replace(SERVED, address=address)
        made = router(teachers={"math": str(folder), "code": served})
        assert made.shared_vocabulary(tokenizer, 470) == 448
        assert made.shared_vocabulary(tokenizer, 447) == 447
        student = Scorer(tiny_model(3, vocab=448), 447)
        teachers = made.load(loading(student))
        assert [len(scorers_of(t)) for t in (*teachers.teachers.values(), teachers)] == [1, 0, 1]
        assert not isinstance(teachers, Follows)
        scores = teachers.to("cpu").routed(rolled.prompt)(rolled.tokens, WANT, rolled.ids.unsqueeze(-1))
    models = {"math": load_model(str(folder), "teacher.path"), "code": tiny_model(5, vocab=448)}
    for row, source in enumerate(SOURCES):
        own = FrozenScorer(Scorer(models[source].eval(), 447))
        wanted = own(rolled.tokens.rows([row]), WANT, rolled.ids[[row]].unsqueeze(-1))
        assert_same(scores.rows([row]), wanted)


def test_errors_name_the_teacher(tmp_path):
    tokenizer = shipped_tokenizer()
    empty = str(tmp_path)
    with pytest.raises(ConfigError, match=r"^`teacher\.teachers\.math` must be a folder with a model"):
        router(teachers={"math": empty}).shared_vocabulary(tokenizer, 448)
    with pytest.raises(ConfigError, match=r"^`teacher\.default` must be a folder with a model"):
        router(teachers={}, default=empty).shared_vocabulary(tokenizer, 448)
    by_option = LocalTeacher(path=empty, dtype="float32")
    with pytest.raises(ConfigError, match=r"^`teacher\.teachers\.math\.path` must be a folder with a model"):
        router(teachers={"math": by_option}).shared_vocabulary(tokenizer, 448)
    warm = replace(by_option, scoring_temperature=2.0)
    with pytest.raises(ConfigError, match=r"^`teacher\.teachers\.math\.scoring_temperature` must"):
        router(teachers={"math": warm}).check_temperature(1.0)
    router(teachers={"math": replace(by_option, scoring_temperature=2.0)}).check_temperature(2.0)
    with pytest.raises(ConfigError, match=r"^`teacher\.teachers\.math\.dtype` must"):
        router(teachers={"math": replace(by_option, dtype="int8")})
    shared = {name: getattr(SERVED, name) for name in ("address", "token_env", "timeout_s", "patience_s")}
    vllm = VllmTeacher(path="a", tokens_per_request=9, **shared)
    assert not router(teachers={"math": vllm}).scores_given_ids
    with pytest.raises(ConfigError, match=r"^`student\.scoring_temperature` must be 1 with a vLLM server"):
        router(teachers={"math": vllm}).check_temperature(2.0)
    assert router().scores_given_ids


def a_self_teacher(**more) -> SelfTeacher:
    settings = {
        "path": "here",
        "dtype": "float32",
        "scoring_temperature": None,
        "weights": "live",
        "decay": None,
    }
    return SelfTeacher(
        **settings | {"solution": "answer", "max_prompt_tokens": 512, "context": "={answer}"} | more
    )


def test_teachers_with_prompts_and_weights_of_their_own(tmp_path):
    """A row of the one that sees a solution is scored behind its longer prompt, the others behind the student's."""
    student = Scorer(tiny_model(3, vocab=448))
    averaged = a_self_teacher(weights="ema", decay=0.5, context=None)
    sources = {"shown": a_self_teacher(), "mean": averaged}
    teachers = router(teachers=sources).load(loading(student))
    assert isinstance(teachers, Follows)
    rolled = rollout(["mean", "shown", "mean", "shown", "shown"])
    problems = tuple(
        replace(p, answer="7", messages=({"role": "user", "content": "a"},)) for p in rolled.prompt.problems
    )
    rolled = replace(rolled, prompt=replace(rolled.prompt, problems=problems))
    routed = teachers.routed(rolled.prompt)
    tokens = teacher_tokens(routed, rolled)
    scores = routed(tokens, Want(taken=True))
    for row, name in enumerate(("mean", "shown", "mean", "shown", "shown")):
        own, one = teachers.teachers[name], rolled.rows([row])
        wanted = own(teacher_tokens(own, one), Want(taken=True)).taken_logp
        torch.testing.assert_close(scores.taken_logp[[row]], wanted, atol=2e-5, rtol=1e-5)
    assert routed_by(TEACHERS).view is None
    held = teachers.teachers["mean"]
    assert isinstance(held, AveragedScorer)
    before = next(held.scorer.parameters()).clone()
    with torch.no_grad():
        next(student.parameters()).add_(1.0)
    teachers.follow(student, 0.0)
    torch.testing.assert_close(next(held.scorer.parameters()), before + 0.5)


def test_no_teacher_of_several_writes():
    student = Scorer(tiny_model(vocab=448))
    engine = TransformersEngine(batch_size=4, method="auto")
    tokenizer = shipped_tokenizer()
    with pytest.raises(ConfigError, match="`rollout` must have one teacher in this process to write tokens"):
        writers_for(engine, student, routed_by(TEACHERS), tokenizer, (0,), frozenset({"teacher"}))
    writers_for(engine, student, routed_by(TEACHERS), tokenizer, (0,), frozenset({"student", "gold"}))


# -- metrics


def graded(correct) -> Graded:
    n = len(correct)
    zeros = torch.zeros(n)
    return Graded(
        correct=torch.tensor(correct),
        lengths=zeros.long(),
        truncated=zeros.bool(),
        repetition=zeros,
        repetitive=zeros.bool(),
        group=zeros.long(),
        difficulty=(None,) * n,
        prompts=("",) * n,
        texts=("",) * n,
    )


def report(routed: RoutedScorer, rolled: Rollout, correct, probe: int = 4):
    student = Scorer(tiny_model(3).eval(), SHARED)
    scoring = ScoringPass(teacher=routed, reference=None, objective=objective(TeacherTopK(k=4)), rows=9)
    with torch.no_grad():
        experience = scoring(student, rolled)
        seen = experience.rows(slice(0, probe))
        looked = seen, student(seen.rollout.tokens, Want(taken=True, entropy=True))
    places = routed.route(rolled.prompt)
    taught = {name: places == place for place, name in enumerate(routed.names)}
    return describe(graded(correct), experience, looked, taught), experience, looked[1]


def test_metrics_of_each_teacher():
    """Share and accuracy by hand; log-probs as means over the teacher's own tokens of the student's."""
    rolled = rollout()
    other = torch.full_like(rolled.origin, Origin.DATA)
    other[1:] = Origin.STUDENT
    rolled = replace(rolled, origin=other)  # row 0, of math, is no response of the student's
    correct = [1.0, 1.0, 0.0, 1.0, float("nan"), 0.0, 1.0]
    found, experience, student = report(routed_by(TEACHERS), rolled, correct)
    means = found.means(lambda table: table, torch.device("cpu"))
    assert means["teacher/math/share"] == pytest.approx(3 / 6)  # rows 3, 5, 6 of 1 to 6
    assert means["teacher/code/share"] == pytest.approx(3 / 6)
    assert means["teacher/math/accuracy"] == pytest.approx(2 / 3)
    assert means["teacher/code/accuracy"] == pytest.approx(1 / 2)  # one has no grade
    rows = {"math": [3, 5, 6], "code": [1, 2, 4]}
    for name, own in rows.items():
        mask = rolled.mask[own]
        for quantity, values in (
            ("logp", experience.teacher_taken_logp),
            ("entropy", experience.teacher_entropy),
        ):
            assert means[f"teacher/{name}/{quantity}"] == pytest.approx(
                values[own][mask].mean().item(), rel=1e-5
            )
        seen = [row for row in own if row < 4]
        ratio = (experience.teacher_taken_logp[seen] - student.taken_logp[seen])[rolled.mask[seen]]
        assert means[f"teacher/{name}/log_ratio"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    whole = sum(
        means[f"teacher/{n}/share"] * rolled.mask[r].sum() / 3 * means[f"teacher/{n}/logp"]
        for n, r in rows.items()
    )
    assert whole * 6 / rolled.mask[1:].sum() == pytest.approx(means["teacher/logp"], rel=1e-5)


def test_every_rank_sums_the_same_table():
    """A rank without a row of a teacher has its keys too, and nothing in them."""
    routed = routed_by(TEACHERS | {"nobody": scorer(9)})
    both, *_ = report(routed, rollout(), [1.0] * ROWS)
    one, *_ = report(routed, rollout(["math"] * ROWS), [1.0] * ROWS)
    assert list(one.sums) == list(both.sums)
    assert one.sums["teacher/code/accuracy"] == one.sums["teacher/code/logp"] == (0.0, 0.0)
    tables = [torch.tensor(list(each.sums.values()), dtype=torch.float64) for each in (both, one)]
    means = both.means(lambda table: sum(tables), torch.device("cpu"))
    assert means["teacher/math/share"] == pytest.approx((4 + 7) / 14)
    assert means["teacher/code/share"] == pytest.approx(3 / 14)
    assert means["teacher/nobody/share"] == 0.0
    assert "teacher/nobody/accuracy" not in means
    plain = describe(graded([1.0] * ROWS), collected(TEACHERS["math"], TeacherTopK(k=4), rollout())[0], None)
    assert not [name for name in plain.sums if name.count("/") > 1]
