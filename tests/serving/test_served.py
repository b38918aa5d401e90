"""The client's half against a real server: the scorer's numbers, patience, and what it refuses."""

from __future__ import annotations

import dataclasses
import http.server
import pickle
import threading
import time

import pytest
import torch
from commands.own import shipped_tokenizer
from tiny import random_rollout, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from opd_lightning.errors import ConfigError
from opd_lightning.loading import Loading
from opd_lightning.scorer import Scorer
from opd_lightning.serving import bench as server_side
from opd_lightning.serving.client import Connection, ServerGone
from opd_lightning.serving.identity import TokenizerIdentity
from opd_lightning.teacher.served import ServedScorer, ServedTeacher
from opd_lightning.types import FullTerm, TokenBatch, Want
from serving.servers import VOCAB, a_bench, free_port, serving

TOKENIZER = shipped_tokenizer()


def source(address: str, **more) -> ServedTeacher:
    settings = {"token_env": "NO_SUCH_TOKEN", "timeout_s": 30, "patience_s": 0, "tokens_per_request": 10_000}
    return ServedTeacher(address=address, **settings | more)


def loading(vocab: int = VOCAB, temperature: float = 1.0) -> Loading:
    return Loading(
        student=Scorer(tiny_model(vocab=VOCAB)),
        student_path="tiny",
        student_dtype="float32",
        tokenizer=TOKENIZER,
        vocab=vocab,
        scratch_mb=1,
        temperature=temperature,
    )


@pytest.fixture(scope="module")
def address():
    with serving(a_bench()) as (address, _):
        yield address


def batch(rows: int = 6, k: int = 3) -> tuple[TokenBatch, torch.Tensor]:
    tokens = random_rollout(rows, vocab=400).tokens
    return tokens, torch.randint(0, 400, (*tokens.ids.shape, k), generator=torch.Generator().manual_seed(1))


WANTS = [
    Want(taken=True, entropy=True, support="exact", top=5),
    Want(taken=True),
    Want(support="exact"),
    Want(support="renormalised"),
    Want(taken=True, support="renormalised"),
    Want(entropy=True, top=2),
]


@pytest.mark.parametrize("want", WANTS, ids=str)
@pytest.mark.parametrize("tokens_per_request", [10_000, 25])
def test_scores_are_those_of_this_process(address, want, tokens_per_request):
    """Over the shared vocabulary, at the student's temperature; bit-equal where one request holds all rows."""
    tokens, given = batch()
    served = source(address, tokens_per_request=tokens_per_request).load(loading(400, 0.7))
    own = Scorer(tiny_model(vocab=VOCAB).eval(), 400, 2**20, 0.7)
    ids = given if want.support != "none" else None
    with torch.no_grad():
        said, expected = served(tokens, want, ids), own(tokens, want, ids)
    for f in dataclasses.fields(expected):
        one, other = getattr(said, f.name), getattr(expected, f.name)
        if not isinstance(other, torch.Tensor):
            assert one == other
        elif tokens_per_request == 10_000 and want.support != "renormalised":
            assert torch.equal(one, other), f.name
        else:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_requests_hold_at_most_so_many_tokens():
    tokens, _ = batch(12)
    with serving(a_bench()) as (address, service):
        scorer = source(address, tokens_per_request=30).load(loading())
        lengths = (tokens.prompt_mask.sum(-1) + tokens.mask.sum(-1)).tolist()
        cuts = list(scorer._requests(tokens))
        assert [i for cut in cuts for i in range(12)[cut]] == list(range(12))
        assert all(sum(lengths[cut]) <= 30 for cut in cuts)
        assert len(cuts) <= 2 * sum(lengths) / 30
        before = service.counters.answers[200]
        scorer(tokens, Want(taken=True))
        assert service.counters.answers[200] == before + len(cuts)


def test_hidden_states_are_refused(address):
    scorer = source(address).load(loading())
    tokens, _ = batch()
    for want in (Want(hidden=True), Want(full=frozenset({FullTerm("teacher", torch.add)}))):
        with pytest.raises(ConfigError, match="sends no hidden states; use support=teacher"):
            scorer(tokens, want)


def test_a_row_beyond_the_context_is_refused_before_it_is_sent(address):
    scorer = source(address).load(loading())
    tokens = random_rollout(30, prompt=60, time=60, vocab=400).tokens
    with pytest.raises(ConfigError, match=r"context of at least 1\d\d tokens.*got 64; lower rollout"):
        scorer(tokens, Want(taken=True))


# -- who it is


def test_another_tokenizer_is_refused(address):
    vocabulary = TOKENIZER.get_vocab()
    words = sorted(
        (t for t, i in vocabulary.items() if i not in TOKENIZER.added_tokens_decoder), key=vocabulary.get
    )
    swapped = {**vocabulary, words[0]: vocabulary[words[1]], words[1]: vocabulary[words[0]]}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(swapped, unk_token=words[0])))
    with pytest.raises(ConfigError, match="other ordinary tokens"):
        source(address).shared_vocabulary(other, VOCAB)
    assert source(address).shared_vocabulary(TOKENIZER, VOCAB) == VOCAB
    assert source(address).shared_vocabulary(TOKENIZER, 430) == 430
    assert source(address).shared_vocabulary(TOKENIZER, 1000) == VOCAB


def test_special_tokens_may_be_missing_but_not_moved():
    own = TokenizerIdentity.of(TOKENIZER)
    fewer = dict(list(own.added.items())[1:]) | {"<|new|>": 447}
    dataclasses.replace(own, added=fewer).check(TOKENIZER, "teacher.address")
    moved = own.added | {"<|im_end|>": 7}
    with pytest.raises(ConfigError, match=r"im_end.*student id 2, its id 7"):
        dataclasses.replace(own, added=moved).check(TOKENIZER, "teacher.address")
    with pytest.raises(ConfigError, match="cuts text otherwise"):
        dataclasses.replace(own, probes="").check(TOKENIZER, "teacher.address")


def test_another_temperature_is_refused(address):
    with pytest.raises(ConfigError, match="scoring_temperature"):
        source(address, scoring_temperature=2.0).load(loading())


def test_another_version_is_refused():
    with (
        serving(a_bench(version="0")) as (address, _),
        pytest.raises(ConfigError, match=r"speak version 1.*same release"),
    ):
        source(address).load(loading())


def test_another_kind_of_server_is_refused(tmp_path):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.server.kind else 404)
            self.end_headers()
            self.wfile.write(b'{"version": "1", "model": "gpt"}' if self.server.kind else b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        for other.kind, says in ((False, "status 404"), (True, "which is another one")):
            with pytest.raises(ConfigError, match=says):
                source(f"http://127.0.0.1:{other.server_port}").load(loading())
        other.shutdown()


def test_the_token_comes_from_the_environment_and_is_never_shown(monkeypatch):
    with serving(a_bench(), token="hush") as (address, _):
        with pytest.raises(ConfigError, match=r"401.*set MINE to the server's token"):
            source(address, token_env="MINE").load(loading())
        monkeypatch.setenv("MINE", "hush")
        teacher = source(address, token_env="MINE")
        teacher.load(loading())
        assert "hush" not in repr(teacher)
        monkeypatch.setenv("MINE", "hüsh")
        with pytest.raises(ConfigError, match="printable ASCII") as info:
            teacher.load(loading())
        assert "hüsh" not in str(info.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", "127.0.0.1:8765"),
        ("address", "ftp://host"),
        ("address", "http://"),
        ("address", "http://user:secret@host"),
        ("address", None),
        ("timeout_s", 0),
        ("patience_s", -1),
        ("patience_s", "long"),
        ("tokens_per_request", 0),
        ("tokens_per_request", 1.5),
    ],
)
def test_settings_out_of_range(field, value):
    settings = {"address": "http://127.0.0.1:1"} | {field: value}
    with pytest.raises(ConfigError, match=f"teacher.{field}"):
        source(**settings)


# -- positions


def shifted(by: int):
    """A server that reads its scores ``by`` positions beside the token."""
    real = server_side._flat

    def flat(scores, mask):
        return {
            name: torch.roll(values, by, 0) if name in ("taken", "given") else values
            for name, values in real(scores, mask).items()
        }

    return flat


@pytest.mark.parametrize("by", [1, -1])
def test_log_probs_of_another_position_are_refused(monkeypatch, by):
    monkeypatch.setattr(server_side, "_flat", shifted(by))
    with serving(a_bench()) as (address, _), pytest.raises(ConfigError, match="at its own position"):
        source(address).load(loading())


@pytest.mark.parametrize("by", [1, -1, 0])
def test_states_of_another_position_are_refused(monkeypatch, by):
    """The states behind every score, and so all of them alike, are one position late or early."""

    def states(model, tokens, layout):
        found = []
        for row in range(len(tokens.ids)):
            prompt = tokens.prompt_ids[row][tokens.prompt_mask[row]]
            response = tokens.ids[row][tokens.mask[row]]
            every = model.base_model(input_ids=torch.cat([prompt, response])[None], use_cache=False)[0][0]
            begin = len(prompt) - 1 + by
            found.append(every[begin : begin + len(response)])
        return torch.cat(found)

    monkeypatch.setattr("opd_lightning.scorer.last_states", states)
    with serving(a_bench()) as (address, _):
        if not by:
            source(address).load(loading())
            return
        with pytest.raises(ConfigError, match="at its own position"):
            source(address).load(loading())


# -- patience


def test_a_server_that_is_not_there_is_named_with_the_time(capsys):
    address = f"http://127.0.0.1:{free_port()}"
    begun = time.monotonic()
    with pytest.raises(
        ServerGone, match=rf"none from {address} for \d s \(ConnectError.*patience_s=2"
    ) as info:
        source(address, patience_s=2).load(loading())
    assert 2 <= time.monotonic() - begun < 8
    assert "\n" not in str(info.value)
    assert f"no answer from the teacher at {address}" in capsys.readouterr().err


def test_a_server_that_comes_back_is_gone_on_with(capsys):
    port = free_port()
    tokens, _ = batch()
    with serving(a_bench(), port=port) as (address, _):
        scorer = source(address, patience_s=60).load(loading())
        before = scorer(tokens, Want(taken=True))
    later: list[object] = []
    waiting = threading.Thread(target=lambda: later.append(scorer(tokens, Want(taken=True))))
    waiting.start()
    time.sleep(2.5)
    assert not later
    with serving(a_bench(), port=port):
        waiting.join(60)
    assert torch.equal(later[0].taken_logp, before.taken_logp)
    said = capsys.readouterr().err
    assert "waiting up to" in said
    assert "answers again after" in said


def test_a_server_that_comes_back_with_other_weights_is_refused():
    port = free_port()
    tokens, _ = batch()
    with serving(a_bench(), port=port) as (address, _):
        scorer = source(address).load(loading())
    with (
        serving(a_bench(tiny_model(1, vocab=VOCAB)), port=port),
        pytest.raises(ConfigError, match="keep its teacher during a run"),
    ):
        scorer(tokens, Want(taken=True))


def test_a_server_that_hangs_is_given_up_after_the_time(monkeypatch):
    tokens, _ = batch()
    release = threading.Event()
    bench = a_bench()
    with serving(bench) as (address, service):
        scorer = source(address, timeout_s=0.5, patience_s=1).load(loading())
        service.batches.score = lambda requests: release.wait(30) and bench.score(requests)
        try:
            with pytest.raises(ServerGone, match="ReadTimeout"):
                scorer(tokens, Want(taken=True))
        finally:
            release.set()


def test_scoring_that_fails_is_an_error_at_once(caplog):
    tokens, _ = batch()
    with serving(a_bench()) as (address, service):
        scorer = source(address, patience_s=60).load(loading())
        score, service.batches.score = service.batches.score, lambda requests: 1 / 0
        with pytest.raises(ConfigError, match=r"status 500.*ZeroDivisionError"):
            scorer(tokens, Want(taken=True))
        service.batches.score = score
        scorer(tokens, Want(taken=True))


def test_a_connection_survives_pickling(address):
    scorer = source(address).load(loading())
    tokens, _ = batch()
    again: ServedScorer = pickle.loads(pickle.dumps(scorer))
    assert again.connection._clients == {}
    assert torch.equal(
        again(tokens, Want(taken=True)).taken_logp, scorer(tokens, Want(taken=True)).taken_logp
    )


def test_proxies_of_the_environment_are_left_out(address, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    connection = Connection(address=address, token=None, timeout_s=30, patience_s=0, owner="teacher.address")
    assert connection.get("/health").status_code == 200
