"""Making the task's models: what a batch holds, the loss, the rate, and a whole run in small."""

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning.errors import ConfigError
from opd_lightning.make_task import make
from opd_lightning.paths import CONF_DIR
from opd_lightning.task.pretrain import Phase, Size, _rate, encode, new_model, pretrain, response_loss
from opd_lightning.task.tokenizer import build_tokenizer
from opd_lightning.task.word_problems import WordProblems

TASK = WordProblems(min_steps=1, max_steps=3)
SMALL = Size(hidden=16, layers=1, feed_forward=32, heads=4, key_value_heads=2)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TASK.problems("train")[:200])


def test_a_batch_is_prompt_and_response_with_labels_on_the_response(tokenizer):
    problems = TASK.problems("train")[:6]
    ids, labels = encode(tokenizer, problems)
    for problem, row, wanted in zip(problems, ids, labels, strict=True):
        length = int((row != tokenizer.pad_token_id).sum())
        assert tokenizer.decode(row[:length]) == (
            f"<|im_start|>user\n{problem.messages[0]['content']}<|im_end|>\n"
            f"<|im_start|>assistant\n{problem.response}<|im_end|>"
        )
        labelled = wanted != -100
        assert tokenizer.decode(wanted[labelled]) == f"{problem.response}<|im_end|>"
        assert torch.equal(row[labelled], wanted[labelled])
        assert not labelled[length:].any()


def test_the_loss_is_the_models_own(tokenizer):
    model = new_model(SMALL, tokenizer, seed=0)
    ids, labels = encode(tokenizer, TASK.problems("train")[:4])
    logits = model(input_ids=ids).logits.double().log_softmax(-1)
    rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    expected = -logits[rows, places, labels[rows, places + 1]].mean()
    assert response_loss(model, ids, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    # What stands after a response, where a right-padded row needs no mask, cannot change the loss.
    ids[labels.roll(-1, 1).eq(-100) & ids.eq(0)] = 7
    assert response_loss(model, ids, labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_untrained_model_knows_nothing_and_learns(tokenizer):
    model, losses = new_model(SMALL, tokenizer, seed=0), []
    phase = Phase(min_steps=1, max_steps=3, batch=8, steps=30, learning_rate=1e-2, warmup=5, final=0.1)
    pretrain(
        model, tokenizer, lambda _: TASK.problems("train"), [phase], lambda p: losses.append(p.loss) or False
    )
    assert losses[0] == pytest.approx(math.log(model.config.vocab_size), abs=0.2)
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 2


def test_a_report_stops_training(tokenizer):
    phase = Phase(min_steps=1, max_steps=3, batch=2, steps=30, learning_rate=1e-2, warmup=5, final=0.1)
    seen = []

    def report(progress):
        seen.append((progress.phase, progress.step))
        return progress.step == 3 and progress.phase == 1

    short = Phase(min_steps=1, max_steps=1, batch=2, steps=2, learning_rate=1e-2, warmup=1, final=0.1)
    model = new_model(SMALL, tokenizer, seed=0)
    pretrain(model, tokenizer, lambda _: TASK.problems("train"), [short, phase], report)
    assert seen == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]


def test_the_learning_rate_warms_up_and_falls_on_a_line():
    phase = Phase(min_steps=1, max_steps=1, batch=1, steps=100, learning_rate=1.0, warmup=10, final=0.05)
    assert _rate(phase, 0) == pytest.approx(0.1)  # 1/10 of the rate at the first update
    assert _rate(phase, 50) == pytest.approx(0.525)  # half way between 1 and 0.05
    assert _rate(phase, 100) == pytest.approx(0.05)


def test_the_same_seed_makes_the_same_model(tokenizer):
    first, second, third = (new_model(SMALL, tokenizer, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])


TINY = "{hidden: 16, layers: 1, feed_forward: 16, heads: 4, key_value_heads: 2}"
PHASE = "{min_steps: 1, max_steps: 2, batch: 2, steps: 2, learning_rate: 1e-2, warmup: 1, final: 0.1}"


def configuration(*overrides):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("make_task", list(overrides))


def test_the_command_makes_two_models_that_load(tmp_path):
    small = [
        f"{role}.{key}" for role in ("teacher", "student") for key in (f"size={TINY}", f"phases=[{PHASE}]")
    ]
    accuracies = make(configuration(f"out={tmp_path}", "problems=2", "tokenizer.problems=50", *small))
    assert accuracies.keys() == {"teacher", "student"}
    for role, accuracy in accuracies.items():
        assert accuracy == {"greedy": 0.0, "sampled": 0.0}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / role)
        assert model.config.vocab_size >= len(AutoTokenizer.from_pretrained(tmp_path / role))
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)


def test_the_command_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"`roles` must name teacher or student, got \['tutor'\]; use both"):
        make(configuration(f"out={tmp_path}", "roles=[tutor]"))
    with pytest.raises(ConfigError, match=r"`steps` must be a key of the configuration"):
        make(configuration(f"out={tmp_path}", "+steps=3"))
