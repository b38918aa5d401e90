"""The built-in tokenizer: nothing is lost on the way, and each digit is a token."""

import pytest
from transformers import AutoTokenizer

from opd_lightning.task.tokenizer import END, PAD, START, THOUGHT, build_tokenizer
from opd_lightning.task.word_problems import WordProblems

TASK = WordProblems(min_steps=1, max_steps=8)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TASK.problems("train")[:500])


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ids_of_the_marks(loaded):
    assert loaded.convert_tokens_to_ids([PAD, START, END, *THOUGHT]) == [0, 1, 2, 3, 4]
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (0, 2, "left")
    assert len(loaded) <= 448


def test_gold_texts_survive_the_round_trip(loaded):
    for problem in TASK.problems("validation")[:100]:
        for text in (problem.messages[0]["content"], problem.response):
            assert loaded.decode(ids(loaded, text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text", ["数学 é\n\t“naïve”", "x = 12.5; \\frac{1}{2}", "  two  spaces \n\n", "don't"]
)
def test_any_text_survives_the_round_trip(loaded, text):
    assert loaded.decode(ids(loaded, text)) == text


def test_decoding_keeps_thoughts_and_drops_turns(loaded):
    text = "<think>\n1+1=2.\n</think>\nThe answer is \\boxed{2}."
    written = [*ids(loaded, text), loaded.eos_token_id, loaded.pad_token_id]
    assert loaded.decode(written, skip_special_tokens=True) == text
    assert written[0] == 3


def test_each_digit_is_a_token(loaded):
    tokens = loaded.convert_ids_to_tokens(ids(loaded, "Sells 12: 17-12=5. Buys 199"))
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("1217125199")


def test_the_chat_template(loaded):
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?"}]
    text = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    closed = loaded.apply_chat_template([*turns, {"role": "assistant", "content": "2"}], tokenize=False)
    assert closed == text + "2<|im_end|>\n"


def test_the_same_problems_give_the_same_tokenizer(tokenizer):
    again = build_tokenizer(TASK.problems("train")[:500])
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
