"""The server's own half: the numbers of the scorer in this process, whatever was asked together or cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import VOCAB, random_rollout, tiny_model

from opd_lightning.scorer import Scorer
from opd_lightning.serving.bench import Bench
from opd_lightning.serving.identity import ServerInfo, TokenizerIdentity, weights_digest
from opd_lightning.serving.wire import ScoreRequest, Wanted, WireError
from opd_lightning.types import Want

MODEL = tiny_model().eval().requires_grad_(False)
INFO = ServerInfo(
    version="1",
    path="tiny",
    dtype="float32",
    model=weights_digest(MODEL),
    vocab=VOCAB,
    context=16,
    most_ids=8,
    most_bytes=2**20,
    tokenizer=TokenizerIdentity(ordinary="", added={}, probes=""),
)
ALL = Wanted(vocab=40, temperature=0.7, taken=True, entropy=True, top=3, mass=True)


def bench(tokens: int = 10_000) -> Bench:
    return Bench(model=MODEL, info=INFO, scratch=2**20, layout="auto", tokens=tokens)


def asked(rows: int, seed: int, wanted: Wanted = ALL, k: int = 2):
    tokens = random_rollout(rows, vocab=40, seed=seed).tokens
    given = torch.randint(0, 40, (*tokens.ids.shape, k), generator=torch.Generator().manual_seed(seed))
    return tokens, given, ScoreRequest.of(tokens, given if k else None, wanted)


def check(answer, tokens, given, *, exactly: bool) -> None:
    """Compare an answer with what the scorer says of the batch."""
    scores = Scorer(MODEL, 40, 2**20, 0.7)(
        tokens, Want(taken=True, entropy=True, support="exact", top=3), given
    )
    pairs = {
        "taken": scores.taken_logp,
        "given": scores.support_logp,
        "entropy": scores.entropy,
        "top_logp": scores.top_logp,
        "mass": scores.top_logp.exp().sum(-1),
    }
    assert torch.equal(answer.top_ids.long(), scores.top_ids[tokens.mask])
    for name, values in pairs.items():
        tolerance = 0 if exactly else 1e-5
        torch.testing.assert_close(getattr(answer, name), values[tokens.mask], atol=tolerance, rtol=0)


def test_one_request_is_bit_equal_to_this_process():
    tokens, given, request = asked(12, 0)
    (answer,) = bench().score([request])
    check(answer, tokens, given, exactly=True)
    assert answer.model == weights_digest(MODEL)


@pytest.mark.parametrize("budget", [10_000, 40, 1])
def test_requests_together_and_cut_each_get_their_own(budget):
    batches = [asked(rows, seed) for seed, rows in enumerate((3, 1, 7, 2))]
    answers = bench(budget).score([request for _, _, request in batches])
    for (tokens, given, _), answer in zip(batches, answers, strict=True):
        check(answer, tokens, given, exactly=False)


def test_a_pass_never_exceeds_the_budget():
    _, _, request = asked(30, 3)
    pieces = list(bench(40)._pieces(request))
    sizes = [len(rows) * int(request.lengths[rows].max()) for rows in pieces]
    assert max(sizes) <= 40
    assert sorted(torch.cat(pieces).tolist()) == list(range(30))
    assert len(pieces) < 15


def test_rows_without_a_response_have_no_answer():
    tokens, given, _ = asked(4, 1)
    mask = tokens.mask.clone()
    mask[2] = False
    tokens = dataclasses.replace(tokens, mask=mask)
    (answer,) = bench().score([ScoreRequest.of(tokens, given, ALL)])
    check(answer, tokens, given, exactly=False)
    none = dataclasses.replace(tokens, mask=torch.zeros_like(mask))
    (answer,) = bench().score([ScoreRequest.of(none, given, ALL)])
    assert len(answer.taken) == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: dataclasses.replace(r, wanted=dataclasses.replace(ALL, vocab=49)), "at most 48 ids"),
        (lambda r: dataclasses.replace(r, wanted=dataclasses.replace(ALL, top=7)), "at most 8 ids"),
        (lambda r: dataclasses.replace(r, ids=r.ids + 30), "ids must be below 48"),
        (lambda r: dataclasses.replace(r, ids=r.ids - 40), "at least 0"),
        (lambda r: dataclasses.replace(r, given=r.given + 40), "given must be below 40"),
        (lambda r: dataclasses.replace(r, ids=r.ids.clone().fill_(41)), "ids of responses must be below 40"),
        (
            lambda r: dataclasses.replace(
                r,
                ids=torch.cat([r.ids[:1].expand(12), r.ids]),
                prompts=r.prompts + 12 * (torch.arange(6) == 0),
            ),
            "at most 16 tokens",
        ),
    ],
)
def test_what_the_model_cannot_score_is_refused(change, says):
    _, _, request = asked(6, 5)
    bench().check(request)
    with pytest.raises(WireError, match=says):
        bench().check(change(request))


def test_a_step_of_training_changes_the_digest():
    model = tiny_model()
    before = weights_digest(model)
    assert weights_digest(tiny_model()) == before
    with torch.no_grad():
        model.lm_head.weight.add_(1e-3)
    assert weights_digest(model) != before
