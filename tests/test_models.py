"""Two tokenizers that may and may not be distilled between."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from opd_lightning.errors import ConfigError
from opd_lightning.models import shared_vocabulary
from opd_lightning.paths import model_path

OWN = AutoTokenizer.from_pretrained(model_path("builtin:word_problems/student"))


def changed(tmp_path, change):
    """Return the built-in tokenizer with its added tokens changed by ``change``, through its files."""
    OWN.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    return AutoTokenizer.from_pretrained(tmp_path)


def swap(one: str, other: str):
    """Exchange the ids of two added tokens."""

    def change(described):
        vocabulary = described["model"]["vocab"]
        for token in described["added_tokens"]:
            if token["content"] in (one, other):
                token["content"] = other if token["content"] == one else one
        if one in vocabulary and other in vocabulary:
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        described["added_tokens"].sort(key=lambda token: token["id"])

    return change


# numerics 11.25
def test_one_tokenizer_of_two_widths_is_read_up_to_the_smaller():
    assert shared_vocabulary(OWN, OWN, (151_936, 152_064)) == 151_936
    assert shared_vocabulary(OWN, OWN, (152_064, 151_936)) == 151_936


@pytest.mark.parametrize("pair", [("<|im_start|>", "<|im_end|>"), ("<think>", "</think>")])
def test_special_tokens_with_other_ids_are_refused(tmp_path, pair):
    other = changed(tmp_path, swap(*pair))
    assert other.get_vocab()[pair[0]] == OWN.get_vocab()[pair[1]]
    with pytest.raises(ConfigError, match=r"`teacher.path` must .* special tokens have other ids"):
        shared_vocabulary(OWN, other, (448, 448))


def test_an_added_token_of_one_alone_may_differ(tmp_path):
    AutoTokenizer.from_pretrained(model_path("builtin:word_problems/student")).save_pretrained(tmp_path)
    wider = AutoTokenizer.from_pretrained(tmp_path)
    wider.add_tokens(["<tool>"])
    assert shared_vocabulary(OWN, wider, (448, 448)) == 448
