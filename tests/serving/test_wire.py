"""Payloads: what is written is read, padding and pickles are not on the wire, and nothing else is taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save
from tiny import random_rollout

from opd_lightning.serving.wire import ScoreAnswer, ScoreRequest, Wanted, WireError, padded, placed

WANTED = Wanted(vocab=48, temperature=0.7, taken=True, entropy=True, top=3, mass=True)


def request(rows: int = 5, k: int = 2) -> ScoreRequest:
    rollout = random_rollout(rows)
    given = torch.randint(0, 48, (*rollout.ids.shape, k)) if k else None
    return ScoreRequest.of(rollout.tokens, given, WANTED)


def answer(asked: ScoreRequest) -> ScoreAnswer:
    n, k = asked.given.shape
    return ScoreAnswer(
        model="weights",
        taken=torch.randn(n),
        given=torch.randn(n, k) if k else None,
        entropy=torch.rand(n),
        top_ids=torch.randint(0, 48, (n, 3), dtype=torch.int32),
        top_logp=torch.randn(n, 3),
        mass=torch.rand(n),
    )


def same(one, other) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("k", [0, 2])
def test_request_comes_back(k):
    asked = request(k=k)
    assert same(ScoreRequest.read(asked.write()), asked)


@pytest.mark.parametrize("k", [0, 2])
def test_answer_comes_back(k):
    asked = request(k=k)
    said = answer(asked)
    assert same(ScoreAnswer.read(said.write(), asked), said)


def test_rows_come_back_padded():
    tokens = random_rollout(6).tokens
    asked = ScoreRequest.of(tokens, None, WANTED)
    again = padded(asked.ids, asked.prompts, asked.responses)
    widths = int(tokens.prompt_mask.sum(-1).max()), int(tokens.mask.sum(-1).max())
    assert (again.prompt_ids.shape[1], again.ids.shape[1]) == widths
    assert again.prompt_mask[:, -1].all()
    assert again.mask[:, 0].all()
    for row in range(6):
        for ids, mask in (("prompt_ids", "prompt_mask"), ("ids", "mask")):
            assert torch.equal(
                getattr(again, ids)[row][getattr(again, mask)[row]],
                getattr(tokens, ids)[row][getattr(tokens, mask)[row]],
            )


def test_values_are_placed_where_tokens_are():
    mask = torch.tensor([[True, False], [True, True]])
    assert placed(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1.0, 0.0], [2.0, 3.0]]


def test_eight_bytes_an_entry_and_no_padding():
    """An id and its log-prob take 8 bytes; a header of some hundred bytes comes once."""
    asked = request(rows=40, k=16)
    n = len(asked.given)
    said = dataclasses.replace(
        answer(asked), top_ids=None, top_logp=None, taken=None, entropy=None, mass=None
    )
    entries = n * 16
    both = len(asked.write()) + len(said.write())
    rest = 4 * len(asked.ids) + 8 * len(asked.prompts)
    assert 8 * entries + rest <= both <= 8 * entries + rest + 1200
    whole = answer(asked)
    assert asked.answer_bytes <= len(whole.write()) <= asked.answer_bytes + 1000


def changed(**tensors) -> bytes:
    asked = request()
    names = ("ids", "prompts", "responses", "given")
    words = {
        "version": "1",
        "vocab": "48",
        "temperature": "1.0",
        "taken": "1",
        "entropy": "0",
        "top": "0",
        "mass": "0",
    }
    words |= tensors.pop("words", {})
    return save({n: getattr(asked, n).clone() for n in names} | tensors, metadata=words)


def test_what_is_changed_below_is_read_unchanged():
    assert ScoreRequest.read(changed()).wanted == Wanted(vocab=48, taken=True)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "safetensors"),
        (b"garbage" * 100, "safetensors"),
        (b"\xff" * 8, "safetensors"),
        (b'{"ids": [1, 2, 3]}', "safetensors"),
        (changed()[:-4], "safetensors"),
        (changed()[:40], "safetensors"),
        (changed() + b"more", "safetensors"),
        (changed(words={"version": "0"}), "version"),
        (changed(words={"vocab": "-1"}), "header"),
        (changed(words={"top": "1e9"}), "header"),
        (changed(words={"temperature": "nan"}), "temperature"),
        (changed(words={"temperature": "warm"}), "header"),
        (changed(other=torch.zeros(1)), "tensors must be"),
        (changed(ids=torch.zeros(3)), "ids must have"),
        (changed(ids=torch.zeros(3, dtype=torch.int64)), "ids must have"),
        (changed(given=torch.zeros(3, dtype=torch.int32)), "given must have 2 axes"),
        (changed(given=torch.zeros(3, 2, dtype=torch.int32)), "given must have a row"),
        (changed(ids=torch.zeros(3, dtype=torch.int32)), "as many tokens"),
        (changed(prompts=torch.zeros(5, dtype=torch.int32)), "prompt of one token"),
        (changed(responses=-torch.ones(5, dtype=torch.int32)), "response of none or more"),
        (changed(prompts=torch.ones(4, dtype=torch.int32)), "each row"),
        (
            changed(prompts=torch.ones(0, dtype=torch.int32), responses=torch.ones(0, dtype=torch.int32)),
            "each row",
        ),
        (changed(prompts=torch.full((5,), 2**31 - 1, dtype=torch.int32)), "as many tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "body",  # whose header has another order each time
)
def test_anything_else_is_refused(body, says):
    with pytest.raises(WireError, match=says) as info:
        ScoreRequest.read(body)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 250


@pytest.mark.parametrize("change", ["taken", "given", "top_ids"])
def test_an_answer_to_another_request_is_refused(change):
    asked = request()
    said = answer(asked)
    with pytest.raises(WireError, match="must be"):
        ScoreAnswer.read(dataclasses.replace(said, **{change: None}).write(), asked)
    with pytest.raises(WireError, match=change):
        ScoreAnswer.read(dataclasses.replace(said, **{change: getattr(said, change)[1:]}).write(), asked)
