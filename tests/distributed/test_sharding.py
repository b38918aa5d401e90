"""FSDP2 and FSDP1 around a scorer, in a world of one process: the same numbers, whole inside the block."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import random_experience, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from opd_lightning import layout
from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.layers import is_sharded, named_weights
from opd_lightning.lora import Lora, adapters_off, merged, save_adapter
from opd_lightning.scorer import Scorer
from opd_lightning.sharding import decoder_layers, scorer_of, shard, total_norm, unsharded, wrap
from opd_lightning.teacher.self_teacher import AveragedScorer
from opd_lightning.types import FullTerm, Sampling, Want

BATCH = random_experience(5)
WANTS = {"support": Want(support="renormalised"), "exact": Want(taken=True, entropy=True)}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request, mesh) -> tuple[Scorer, Scorer]:
    """A sharded student and the same one whole."""
    sharded, whole = (Scorer(tiny_model(tied=request.param)) for _ in range(2))
    shard(sharded, mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    return sharded, whole


def learn(scorer: Scorer, want: Want) -> torch.Tensor:
    """One SGD step on everything that was asked for; returns the loss."""
    optimizer = torch.optim.SGD(scorer.parameters(), lr=0.1)
    scores = scorer(BATCH.rollout.tokens, want, BATCH.support_ids)
    loss = sum(
        value.sum() for value in (scores.support_logp, scores.taken_logp, scores.entropy) if value is not None
    )
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_equal_weights(sharded: Scorer, whole: Scorer) -> None:
    for (name, mine), theirs in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs.data, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("want", WANTS.values(), ids=WANTS)
def test_a_sharded_student_learns_the_same(pair, want):
    sharded, whole = pair
    before = [p.detach().clone() for p in whole.parameters()]
    for _ in range(3):
        with unsharded(sharded):
            sharded(BATCH.rollout.tokens, want, BATCH.support_ids)
        torch.testing.assert_close(learn(sharded, want), learn(whole, want), atol=1e-4, rtol=1e-6)
    assert_equal_weights(sharded, whole)
    assert any((p - q).abs().max() > 1e-2 for p, q in zip(before, whole.parameters(), strict=True))


@pytest.mark.parametrize("hinted", [True, False])
def test_a_head_may_be_used_twice_in_one_forward(pair, hinted):
    """By log-probs of the taken token and by a full divergence, of which two backward passes follow."""
    teacher = Scorer(tiny_model(2, hidden=40).requires_grad_(False))
    tokens, term = BATCH.rollout.tokens, FullTerm("teacher", ReverseKL())
    hidden = teacher(tokens, Want(hidden=True)).hidden
    share = torch.linspace(0.5, 1.0, tokens.mask.numel()).view(tokens.mask.shape) * tokens.mask
    found = []
    for scorer in pair:
        scorer.set_target("teacher", teacher)
        want = Want(taken=True, entropy=True, full=frozenset({term}))
        scores = scorer(tokens, want, None, {"teacher": hidden}, share if hinted else None)
        (scores.full[term] * share).sum().backward(retain_graph=True)
        (scores.taken_logp.sum() + scores.entropy.sum() + (scores.full[term] * share).sum()).backward()
        found.append([p.grad for p in scorer.parameters()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, atol=1e-4, rtol=1e-4)


def test_a_sharded_student_is_called_once_whatever_its_rows(pair, monkeypatch):
    """Each call gathers the weights on all ranks together, and ranks have rows of other lengths."""
    monkeypatch.setitem(layout.CALL_WORK, "cpu", 0.0)
    calls = []
    for scorer in pair:
        scorer.model.base_model.register_forward_pre_hook(lambda module, _: calls.append(module))
        scorer.layout = "buckets"
    with unsharded(pair[0]):
        pair[0](BATCH.rollout.tokens, WANTS["support"], BATCH.support_ids)
    calls.clear()
    torch.testing.assert_close(*(learn(scorer, WANTS["support"]) for scorer in pair), atol=1e-4, rtol=1e-6)
    assert [sum(c is s.model.base_model for c in calls) for s in pair] == [1, 4]


def test_generation_sees_whole_weights_as_they_are_now(pair):
    sharded, whole = pair
    engine, sampling = TransformersEngine(method="loop"), Sampling(max_new_tokens=8, stop_ids=(0,))
    drawn = []
    for _ in range(2):
        with unsharded(sharded):
            assert not any(isinstance(p, DTensor) for p in sharded.parameters())
            mine = engine.generate(sharded.model, BATCH.rollout.prompt, sampling)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        theirs = engine.generate(whole.model, BATCH.rollout.prompt, sampling)
        assert torch.equal(mine.ids, theirs.ids)
        torch.testing.assert_close(mine.behavior_logp, theirs.behavior_logp, atol=1e-5, rtol=1e-5)
        drawn.append(mine.behavior_logp[:, 0])
        for scorer in pair:
            learn(scorer, WANTS["exact"])
    assert not torch.allclose(drawn[0], drawn[1])


def test_what_was_gathered_for_an_evaluation_can_be_trained(pair):
    """Lightning evaluates in inference mode, before it trains; tensors made in that mode take no gradient."""
    sharded, whole = pair
    with torch.inference_mode(), unsharded(sharded):
        assert not torch.is_grad_enabled()
        scores = sharded(BATCH.rollout.tokens, Want(taken=True))
        assert not scores.taken_logp.requires_grad
    for scorer in pair:
        learn(scorer, WANTS["exact"])
    assert_equal_weights(sharded, whole)


def test_a_block_that_fails_leaves_shards(pair):
    sharded, _ = pair
    with pytest.raises(RuntimeError, match="out of tokens"), unsharded(sharded):
        raise RuntimeError("out of tokens")
    assert all(isinstance(p, DTensor) for p in sharded.parameters())


def test_a_student_that_is_not_sharded_is_left_alone():
    scorer = Scorer(tiny_model())
    with unsharded(scorer):
        assert torch.is_grad_enabled()


def test_decoder_layers_are_the_longest_list():
    scorer = Scorer(tiny_model())
    scorer.model.adapters = torch.nn.ModuleList([torch.nn.Identity()])
    assert decoder_layers(scorer) == list(scorer.model.model.layers)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def wrapped(request, mesh) -> tuple[FullyShardedDataParallel, Scorer]:
    """A student inside FSDP1 and the same one whole."""
    inner, whole = (Scorer(tiny_model(tied=request.param)) for _ in range(2))
    return wrap(inner, torch.device("cpu")), whole


@pytest.mark.parametrize("want", WANTS.values(), ids=WANTS)
def test_a_wrapped_student_learns_the_same(wrapped, want):
    root, whole = wrapped
    for _ in range(3):
        with unsharded(scorer_of(root)):
            scorer_of(root)(BATCH.rollout.tokens, want, BATCH.support_ids)
        torch.testing.assert_close(learn(root, want), learn(whole, want), atol=1e-4, rtol=1e-6)
        torch.testing.assert_close(total_norm(root), total_norm(whole))
    with unsharded(scorer_of(root)):
        mine = dict(scorer_of(root).named_parameters(remove_duplicate=False))
        assert mine.keys() == dict(whole.named_parameters(remove_duplicate=False)).keys()
        for name, theirs in whole.named_parameters(remove_duplicate=False):
            torch.testing.assert_close(mine[name].data, theirs.data, atol=1e-6, rtol=1e-6, msg=name)


def test_inside_the_block_a_wrapped_student_is_plain_and_outside_it_is_not(wrapped):
    scorer = scorer_of(wrapped[0])

    def inner() -> int:
        return sum(isinstance(module, FullyShardedDataParallel) for module in scorer.modules())

    assert inner() == len(decoder_layers(scorer)) == 2
    with unsharded(scorer):
        assert inner() == 0
        assert is_sharded(scorer.model)  # a copy of its weights is known by their version alone
    assert inner() == len(decoder_layers(scorer)) == 2


def test_adapters_learn_the_same_sharded(mesh, tmp_path):
    """A frozen base and trained adapters in one group."""
    pytest.importorskip("peft")
    lora = Lora(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    sharded, whole = (Scorer(tiny_model()) for _ in range(2))
    for scorer in (sharded, whole):
        lora.add_to(scorer.model, seed=0)
    shard(sharded, mesh)
    for _ in range(2):
        torch.testing.assert_close(
            learn(sharded, WANTS["exact"]), learn(whole, WANTS["exact"]), atol=1e-4, rtol=1e-6
        )
    with unsharded(sharded), adapters_off(sharded.model):
        off = sharded(BATCH.rollout.tokens, Want(taken=True)).taken_logp
    expected = Scorer(tiny_model())(BATCH.rollout.tokens, Want(taken=True)).taken_logp
    torch.testing.assert_close(off, expected.detach(), atol=1e-5, rtol=1e-5)
    assert_equal_weights(sharded, whole)
    trained = {name for name, p in sharded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in whole.named_parameters() if p.requires_grad}
    expected = merged(whole.model, dict(named_weights(whole.model)))
    with unsharded(sharded):
        save_adapter(sharded.model, dict(named_weights(sharded.model)), tmp_path / "sharded")
        found = merged(sharded.model, dict(named_weights(sharded.model)))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].data, tensor.detach(), atol=1e-6, rtol=1e-6)
    save_adapter(whole.model, dict(named_weights(whole.model)), tmp_path / "whole")
    mine, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("sharded", "whole"))
    assert mine.keys() == theirs.keys() != set()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-6, rtol=1e-6)


def test_an_average_follows_a_sharded_student(mesh):
    students, averages = ([Scorer(tiny_model(seed=seed)) for _ in range(2)] for seed in (0, 1))
    names = tuple(name for name, _ in students[0].model.named_parameters())
    shard(students[0], mesh)
    for student, average in zip(students, averages, strict=True):
        learn(student, WANTS["exact"])
        with unsharded(student):
            AveragedScorer(average, decay=0.5, averaged=names).follow(student, 0.0)
    for mine, theirs in zip(*(average.parameters() for average in averages), strict=True):
        torch.testing.assert_close(mine.data, theirs.data, atol=1e-6, rtol=1e-6)
    moved = Scorer(tiny_model(seed=1)).parameters()
    assert any((p - q).abs().max() > 1e-2 for p, q in zip(moved, averages[1].parameters(), strict=True))
