"""``student.gradient_checkpointing``: the same loss and gradients from fewer kept tensors."""

from __future__ import annotations

import pytest
import torch
from tiny import random_experience, tiny_model

from opd_lightning.errors import ConfigError
from opd_lightning.layers import check_checkpointing, checkpoint_layers
from opd_lightning.lora import Lora
from opd_lightning.scorer import Scorer
from opd_lightning.types import Want

BATCH = random_experience(5, time=30)


def student(checkpointing: bool, adapters: bool) -> Scorer:
    model = tiny_model()
    if adapters:
        pytest.importorskip("peft")
        Lora(rank=4, alpha=8, dropout=0.2, target_modules="all-linear").add_to(model, seed=0)
    if checkpointing:
        checkpoint_layers(model, "tiny")
    return Scorer(model).train()


def learn(scorer: Scorer) -> tuple[float, list[torch.Tensor], int]:
    """Return the loss, the gradients, and the bytes that the graph kept for its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # of the adapters' dropout, which is drawn alike when a layer is computed again
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = scorer(BATCH.rollout.tokens, Want(taken=True)).taken_logp.sum()
    loss.backward()
    return (
        float(loss.detach()),
        [p.grad for p in scorer.parameters() if p.grad is not None],
        sum(kept.values()),
    )


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_the_same_gradient_from_less(adapters):
    (expected, reference, before), (loss, found, after) = (
        learn(student(checkpointing, adapters)) for checkpointing in (False, True)
    )
    assert loss == expected
    assert len(found) == len(reference) > 0
    for mine, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in reference)
    assert after < 0.7 * before


def test_nothing_is_computed_twice_where_nothing_is_learnt():
    scorer, calls = student(True, False), []
    scorer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    learn(scorer)
    assert len(calls) == 2
    scorer.eval()
    with torch.no_grad():
        scorer(BATCH.rollout.tokens, Want(taken=True))
    assert len(calls) == 3


def test_a_switch_that_is_none():
    with pytest.raises(
        ConfigError, match=r"`student.gradient_checkpointing` must be true or false, got 'yes'"
    ):
        check_checkpointing("yes")


def test_a_model_that_cannot():
    model = tiny_model()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"must be false for Qwen3ForCausalLM, got 'tiny'; use false"):
        checkpoint_layers(model, "tiny")
