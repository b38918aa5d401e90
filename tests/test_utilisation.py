"""Model FLOPs: known counts, the counter of torch on real passes, and who is charged in a collection."""

from __future__ import annotations

import csv
from collections import Counter

import pytest
import torch
from commands.running import here
from test_collector import WIDTH, collect, collector
from tiny import VOCAB, random_rollout, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from opd_lightning.clock import PhaseClock
from opd_lightning.diagnostics.utilisation import Meter, Work, measured_peak, scored
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.loading import FrozenScorer
from opd_lightning.scorer import Scorer
from opd_lightning.types import FullTerm, TokenBatch, Want

# Of tiny_model: a layer is q, o 32 x 32 each, k, v 32 x 16 each, three 32 x 64, two norms of 32 and two of 8.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32 + 2 * 8
BODY = 2 * LAYER + 32


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_known_model(tied):
    work = Work.of(Scorer(tiny_model(tied=tied), vocab=40))
    assert work == Work(body=BODY, trained=1.0, head=32, vocab=40, head_trained=True)


def test_known_operations():
    work = Work(body=1000, trained=1.0, head=10, vocab=50, head_trained=True)
    # Three tokens read, two of them asked for 5 ids: 2 * 1000 * 3 + 2 * 10 * 5 * 2; twice that backwards.
    assert work.forward(3, 2, 5) == 6200
    assert work.backward(3, 2, 5) == 12400
    # Adapters on a frozen model: gradients of the inputs, and of a tenth of the weights.
    adapted = Work(body=1000, trained=0.1, head=10, vocab=50, head_trained=False)
    assert adapted.backward(3, 2, 5) == pytest.approx(6600 + 200)


def one_row(prompt: int, response: int) -> TokenBatch:
    ids = torch.randint(0, VOCAB, (1, prompt + response))
    whole = torch.ones_like(ids, dtype=torch.bool)
    return TokenBatch(
        prompt_ids=ids[:, :prompt], prompt_mask=whole[:, :prompt], ids=ids[:, prompt:], mask=whole[:, prompt:]
    )


def matmuls(counter: FlopCounterMode) -> int:
    total: Counter = Counter(counter.get_flop_counts()["Global"])
    return sum(n for operator, n in total.items() if str(operator) in ("aten.mm", "aten.addmm", "aten.bmm"))


@pytest.mark.parametrize(
    ("want", "learning"), [(Want(hidden=True), False), (Want(hidden=True), True), (Want(taken=True), False)]
)
def test_operations_are_those_of_the_products(want, learning):
    """Against torch's count of what a pass does; norms are weights but no products, a hundredth here."""
    scorer, tokens = Scorer(tiny_model(tied=False)), one_row(9, 21)
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(learning):
        scores = scorer(tokens, want)
        if learning:
            scores.hidden.sum().backward()
    expected = scored(Work.of(scorer), tokens, want, None, {}, learning=learning)
    assert expected == pytest.approx(matmuls(counter), rel=0.015)


def test_the_head_counts_as_far_as_it_is_asked():
    work = Work(body=0, trained=0.0, head=10, vocab=50, head_trained=True)
    tokens = random_rollout(5).tokens
    n, ids = int(tokens.mask.sum()), torch.zeros(*tokens.ids.shape, 4)

    def of(want: Want, learning: bool = False) -> float:
        wide = {"teacher": torch.zeros(*tokens.ids.shape, 16)}
        return scored(work, tokens, want, ids, wide, learning=learning) / (2 * n)

    assert of(Want(hidden=True)) == 0
    assert of(Want(support="renormalised")) == 10 * 4
    assert of(Want(support="renormalised"), True) == 3 * 10 * 4
    assert of(Want(support="renormalised", taken=True)) == of(Want(top=3)) == 10 * 50
    # Over the whole vocabulary both heads are read, and the other model's has no backward.
    term = FullTerm("teacher", ReverseKL())
    assert of(Want(full=frozenset({term}))) == 10 * 50 + 16 * 50
    assert of(Want(full=frozenset({term})), True) == 3 * 10 * 50 + 16 * 50


def test_of_experts_those_count_that_a_token_meets():
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert experts == 8 * 3 * 16 * 8
    ends = 2 * VOCAB * 16
    everything = sum(p.numel() for p in model.parameters()) - ends
    assert Work.of(Scorer(model)).body == everything - experts * 6 / 8


def test_a_collection_charges_the_models_that_ran():
    """Generation to the student, scoring to the teacher, each behind its own count of tokens."""
    student = Scorer(tiny_model(1, vocab=WIDTH)).eval()
    teacher = FrozenScorer(Scorer(tiny_model(2, vocab=WIDTH, hidden=40)).eval())
    clock = PhaseClock()
    meter = Meter(clock.charge)
    scorers = (student, teacher.scorer, student)  # a scorer that is two models' is followed once
    for scorer in scorers:
        meter.attach(scorer)
    steps, _ = collect(collector(teacher, clock=clock, meter=meter, probe_rows=0), student)
    tokens = [part.rollout.tokens for step in steps for part in step]
    prompts = sum(int(t.prompt_mask.sum()) for t in tokens)
    responses, rows = sum(int(t.mask.sum()) for t in tokens), sum(len(t.mask) for t in tokens)
    written, read = (Work.of(s) for s in (student, teacher.scorer))
    whole = (prompts + responses - rows, responses)
    assert clock.work["generate"] == pytest.approx(written.forward(*whole, written.vocab))
    assert clock.work["score"] == pytest.approx(read.forward(*whole, read.vocab))
    (step, *_), _ = collect(collector(teacher, clock=clock, meter=meter), student)
    clock.switch("train")
    before = clock.work["train"]
    student(step[0].rollout.tokens, Want(support="renormalised"), step[0].support_ids)
    part = step[0].rollout.tokens
    n = int(part.mask.sum())
    all_read = int(part.prompt_mask.sum()) + n - len(part.mask)
    assert clock.work["train"] - before == pytest.approx(3 * written.forward(all_read, n, 4), rel=1e-6)


def test_rates_are_work_over_seconds(monkeypatch):
    now = iter([0.0, 2.0, 6.0, 6.0, 10.0])
    monkeypatch.setattr("opd_lightning.clock.time.perf_counter", lambda: next(now))
    clock = PhaseClock()
    clock.switch("generate")
    clock.charge(4e12)
    clock.switch("train")
    clock.charge(20e12)
    clock.switch(None)
    clock.charge(1.0)  # nobody's
    assert clock.tflops() == {"generate": 2.0, "train": 5.0, "all": 4.0}
    lap = clock.lap()
    assert (lap["time/generate_tflops"], lap["time/train_tflops"], lap["time/model_tflops"]) == (
        2.0,
        5.0,
        4.0,
    )
    clock.switch("train")
    clock.charge(2e12)
    clock.switch(None)
    lap = clock.lap()
    assert lap["time/train_tflops"] == lap["time/model_tflops"] == 0.5
    assert "time/generate_tflops" not in lap


def test_the_peak_is_of_a_matrix_product():
    """Measured here again, by more products of one size; within a factor for a busy machine."""
    peak = measured_peak(torch.device("cpu"), torch.float32)
    with torch.profiler.profile() as profiler:
        left = torch.ones(512, 512)
        for _ in range(5):
            left @ left
    fastest = min(e.device_time or e.cpu_time_total for e in profiler.events() if e.name == "aten::mm")
    assert 0.25 <= peak / (2 * 512**3 / fastest / 1e6) <= 4


def test_a_run_reports_its_share(tmp_path):
    done = here("train", "debug=fast", "reporting.peak_tflops=0.5", folder=tmp_path / "run")
    summary = done.summary
    assert summary["peak_tflops"] == 0.5
    assert {"generate", "score", "probe", "train", "evaluate", "all"} == set(summary["mfu"])
    for name, rate in summary["model_tflops"].items():
        assert summary["mfu"][name] == pytest.approx(rate / 0.5, abs=6e-5)
    assert f"utilisation {summary['mfu']['all']:.1%} of 0.5 TFLOP/s" in done.out
    assert "matrix product" not in done.out + done.err
    with (done.folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["time/mfu"]]
    assert rows
    for row in rows:
        assert float(row["time/mfu"]) == pytest.approx(float(row["time/model_tflops"]) / 0.5, rel=1e-3)


def test_without_a_number_the_peak_is_measured_and_said(tmp_path):
    done = here("train", "debug=fast", folder=tmp_path / "run")
    assert done.out.count("the fastest matrix product here in float32") == 1
    assert done.summary["peak_tflops"] > 0
