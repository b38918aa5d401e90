"""The shipped teacher and student score what is claimed for them, and stay small."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.paths import CHECKPOINTS
from opd_lightning.task.tokenizer import build_tokenizer
from opd_lightning.task.word_problems import WordProblems

FOLDER = CHECKPOINTS / "word_problems"
ROLES = ("teacher", "student")
# Greedy accuracy on the 256 validation problems of 3 to 6 steps (README.md beside them).
CLAIMED = {"teacher": 0.99, "student": 0.359}
ASKED = 128


def load(role):
    return AutoModelForCausalLM.from_pretrained(FOLDER / role).eval(), AutoTokenizer.from_pretrained(
        FOLDER / role
    )


@torch.no_grad()
def greedy_accuracy(model, tokenizer, problems):
    """Grade transformers' own greedy decoding; a response without a stop token is wrong."""
    task, right = WordProblems(), 0.0
    prompts = tokenizer.apply_chat_template(
        [[dict(m) for m in problem.messages] for problem in problems],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**prompts, do_sample=False, max_new_tokens=128)
    for problem, row in zip(problems, written[:, prompts["input_ids"].shape[1] :], strict=True):
        if tokenizer.eos_token_id in row:
            right += task.grade(problem, tokenizer.decode(row, skip_special_tokens=True))
    return right / len(problems)


@pytest.mark.parametrize("role", ROLES)
def test_accuracy_is_as_claimed(role):
    accuracy = greedy_accuracy(*load(role), WordProblems().problems("validation")[:ASKED])
    claimed = CLAIMED[role]
    # Half of the 256 problems behind the claim: three standard errors of a sample without replacement.
    error = math.sqrt(claimed * (1 - claimed) / ASKED * (256 - ASKED) / 255)
    assert abs(accuracy - claimed) <= 3 * error


@pytest.mark.parametrize("role", ROLES)
def test_size_and_shape(role):
    model, tokenizer = load(role)
    assert all(path.stat().st_size < 3_000_000 for path in (FOLDER / role).iterdir())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size % 16 == 0
    assert len(tokenizer) <= model.config.vocab_size
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert model.config.tie_word_embeddings
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)


def test_both_have_the_tokenizer_that_the_task_builds():
    wide = WordProblems(min_steps=1, max_steps=8).problems("train")
    built = build_tokenizer(wide[:4000])
    for role in ROLES:
        _, tokenizer = load(role)
        assert tokenizer.get_vocab() == built.get_vocab()
        assert tokenizer.chat_template == built.chat_template
