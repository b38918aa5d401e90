"""The special-token mask: numerics.md section 11, point 26."""

import pytest
import torch
from tabular import make_rollout
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from opd_lightning.errors import ConfigError
from opd_lightning.mask.special_tokens import SpecialTokens
from opd_lightning.reduction.sequence_mean import SequenceMean
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.types import Experience, Needs
from opd_lightning.world import World


@pytest.fixture(scope="module")
def tokenizer():
    """One id a character, the unknown one for the rest, a <bos> before every text."""
    vocabulary = {c: i for i, c in enumerate(["<unk>", "<bos>", "<eos>", *"abc<|>"])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = Split("", "isolated")
    model.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def kept(mask, rollout):
    """The tokens that stay of a rollout."""
    experience = Experience(rollout=rollout, share=torch.zeros(rollout.ids.shape))
    return rollout.mask & mask(experience, rollout.mask, World())


def test_the_fixture_inserts_and_does_not_know(tokenizer):
    assert tokenizer.encode("ax") == [1, 3, 0]


# numerics 11.26
def test_bind_collects_all_ids_of_each_string(tokenizer):
    bound = SpecialTokens(tokens=("ab", "<|", "<eos>", "xyz")).bind(tokenizer)
    # a, b; <, |; <eos>; nothing of what the tokenizer does not know, and no inserted <bos>
    assert bound.ids == (2, 3, 4, 6, 7)
    assert bound.tokens == ("ab", "<|", "<eos>", "xyz")


# numerics 11.26
def test_first_occurrence_of_each_id_in_each_response():
    ids = torch.tensor([[5, 3, 3, 5, 4], [3, 9, 9, 3, 5], [9, 9, 9, 9, 9]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4] = False  # padding that happens to hold a listed id
    keep = kept(SpecialTokens(tokens=("x",), ids=(3, 5)), make_rollout(ids, mask))
    assert keep.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


# numerics 11.26
def test_padding_before_a_token_is_not_an_occurrence():
    ids = torch.tensor([[3, 9, 3, 3]])
    mask = torch.tensor([[False, True, True, True]])
    keep = kept(SpecialTokens(tokens=("x",), ids=(3,)), make_rollout(ids, mask))
    assert keep.tolist() == [[False, True, False, True]]


def test_nothing_listed_removes_nothing(tokenizer):
    ids = torch.tensor([[3, 9, 3]])
    rollout = make_rollout(ids, torch.ones_like(ids, dtype=torch.bool))
    assert kept(SpecialTokens(tokens=[]).bind(tokenizer), rollout).all()
    assert kept(SpecialTokens(tokens=("zzz",)).bind(tokenizer), rollout).all()


# numerics 11.26
def test_a_string_of_several_ids_loses_the_first_of_each(tokenizer):
    """Not the first occurrence of the string: its ids are looked for one by one."""
    mask = SpecialTokens(tokens=("<|",)).bind(tokenizer)
    less, bar, a = (tokenizer.convert_tokens_to_ids(c) for c in "<|a")
    ids = torch.tensor([[bar, a, less, bar, less, a]])
    rollout = make_rollout(ids, torch.ones_like(ids, dtype=torch.bool))
    assert kept(mask, rollout).int().tolist() == [[0, 1, 0, 1, 1, 1]]


# numerics 11.26
def test_denominators_follow():
    """Shares are 1 over the tokens that stay, of the batch or of the response."""
    ids = torch.tensor([[3, 9, 9, 9], [3, 3, 9, 9], [3, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    stays = kept(SpecialTokens(tokens=("x",), ids=(3,)), make_rollout(ids, mask))
    total = World().total
    by_token = [[0, 1 / 5, 1 / 5, 1 / 5], [0, 1 / 5, 1 / 5, 0], [0, 0, 0, 0]]
    by_response = [[0, 1 / 6, 1 / 6, 1 / 6], [0, 1 / 4, 1 / 4, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(TokenMean()(stays, total), torch.tensor(by_token))
    torch.testing.assert_close(SequenceMean()(stays, total), torch.tensor(by_response))


def test_needs_nothing_collected():
    assert SpecialTokens(tokens=()).needs == Needs()


def test_refusals():
    with pytest.raises(ConfigError, match="must be a list of strings"):
        SpecialTokens(tokens="<think>")
    rollout = make_rollout(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ConfigError, match="call bind"):
        kept(SpecialTokens(tokens=("<",)), rollout)
