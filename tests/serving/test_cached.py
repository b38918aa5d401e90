"""A cache of a teacher's scores: what was asked once is not asked again, and nothing else is mistaken for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import VOCAB, random_rollout, tiny_model

from opd_lightning.errors import ConfigError
from opd_lightning.loading import FrozenScorer
from opd_lightning.scorer import Scorer
from opd_lightning.teacher.cached import CachedScorer
from opd_lightning.types import Want

WANT = Want(taken=True, entropy=True, support="exact", top=4)
TOKENS = random_rollout(6).tokens
GIVEN = torch.randint(0, VOCAB, (*TOKENS.ids.shape, 3), generator=torch.Generator().manual_seed(0))


class Counting:
    """A real scorer that counts the rows that it is asked for."""

    def __init__(self) -> None:
        self.scorer, self.rows = FrozenScorer(Scorer(tiny_model().eval())), 0

    def __call__(self, tokens, want, support_ids=None):
        self.rows += len(tokens.ids)
        return self.scorer(tokens, want, support_ids)


@pytest.fixture
def cache(tmp_path):
    return CachedScorer(teacher=Counting(), model="m", vocab=VOCAB, temperature=1.0, folder=tmp_path)


def same(one, other, tolerance: float = 0) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)]
    return all(
        torch.allclose(a, b, atol=tolerance, rtol=0) and a.dtype == b.dtype
        if isinstance(a, torch.Tensor)
        else a == b
        for a, b in pairs
    )


@pytest.mark.parametrize(
    "want",
    [WANT, Want(taken=True), Want(support="exact"), Want(support="renormalised"), Want(entropy=True, top=2)],
    ids=str,
)
def test_what_comes_again_is_not_asked_again(cache, want):
    given = GIVEN if want.support != "none" else None
    own = cache.teacher.scorer(TOKENS, want, given)
    first, again = cache(TOKENS, want, given), cache(TOKENS, want, given)
    assert cache.teacher.rows == 6
    assert same(again, first)
    assert same(first, own, 1e-6 if want.support == "renormalised" else 0)


def test_new_rows_alone_are_asked(cache):
    cache(TOKENS.rows([1, 4]), WANT, GIVEN[[1, 4]])
    whole = cache(TOKENS, WANT, GIVEN)
    assert cache.teacher.rows == 2 + 4
    assert same(whole, cache.teacher.scorer(TOKENS, WANT, GIVEN), 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: (dataclasses.replace(c, model="other"), TOKENS, WANT, GIVEN),
        lambda c: (dataclasses.replace(c, temperature=0.5), TOKENS, WANT, GIVEN),
        lambda c: (dataclasses.replace(c, vocab=VOCAB - 1), TOKENS, WANT, GIVEN),
        lambda c: (c, TOKENS, dataclasses.replace(WANT, top=3), GIVEN),
        lambda c: (c, TOKENS, WANT, (GIVEN + 1) % VOCAB),
        lambda c: (c, dataclasses.replace(TOKENS, ids=(TOKENS.ids + 1) % VOCAB), WANT, GIVEN),
        lambda c: (c, dataclasses.replace(TOKENS, prompt_ids=(TOKENS.prompt_ids + 1) % VOCAB), WANT, GIVEN),
    ],
    ids=["model", "temperature", "vocabulary", "want", "given", "response", "prompt"],
)
def test_what_differs_is_asked(cache, change):
    cache(TOKENS, WANT, GIVEN)
    other, *asked = change(cache)
    other(*asked)
    assert cache.teacher.rows == 12


def test_padding_is_no_difference(cache):
    cache(TOKENS, WANT, GIVEN)
    wider = dataclasses.replace(
        TOKENS,
        prompt_ids=torch.nn.functional.pad(TOKENS.prompt_ids, (3, 0), value=7),
        prompt_mask=torch.nn.functional.pad(TOKENS.prompt_mask, (3, 0)),
    )
    cache(wider, WANT, GIVEN)
    assert cache.teacher.rows == 6


@pytest.mark.parametrize("broken", [b"", b"garbage", None])
def test_a_broken_file_is_asked_again_and_repaired(cache, tmp_path, broken):
    first = cache(TOKENS, WANT, GIVEN)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 6
    files[0].write_bytes(files[0].read_bytes()[:-5] if broken is None else broken)
    assert same(cache(TOKENS, WANT, GIVEN), first, 1e-5)
    assert cache.teacher.rows == 7
    cache(TOKENS, WANT, GIVEN)
    assert cache.teacher.rows == 7
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == files


def test_hidden_states_are_refused(cache):
    with pytest.raises(ConfigError, match=r"`teacher.cache` must be null"):
        cache(TOKENS, Want(hidden=True))
