"""``student.compile``: the same numbers, names and generation; what is compiled is what learns and scores."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from commands.running import here
from test_layout import CASES, ragged, scored
from tiny import VOCAB, random_experience, random_rollout, tiny_model
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from opd_lightning.engine.shape import supports
from opd_lightning.engine.transformers import TransformersEngine
from opd_lightning.layers import compile_layers, eager
from opd_lightning.scorer import Scorer
from opd_lightning.sharding import shard, unsharded
from opd_lightning.types import Sampling, Want


def compiled_frames() -> int:
    return sum(counters["frames"].values())


@pytest.mark.parametrize("method", ["loop", "generate"])
def test_generation_is_as_before(method):
    """Names, the fast decoder's view of the model, and tokens; nothing is compiled for it."""
    plain, model = tiny_model(), tiny_model()
    names = list(model.state_dict())
    compile_layers(model)
    assert list(model.state_dict()) == names
    assert supports(model)
    prompts, sampling = random_rollout(4).prompt, Sampling(max_new_tokens=6, stop_ids=(0,))
    engine, before = TransformersEngine(method=method), compiled_frames()
    with eager(model):
        drawn = engine.generate(model, prompts, sampling)
    assert compiled_frames() == before
    assert torch.equal(drawn.ids, engine.generate(plain, prompts, sampling).ids)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scores_and_gradients_are_the_same():
    """At two sizes, which are compiled once; a copy is not compiled."""
    model, before, inputs = tiny_model(), compiled_frames(), []
    for case in ("ragged", "alike"):
        prompts, responses = CASES[case]
        tokens = ragged(random_rollout(len(prompts)), prompts, responses)
        ids = torch.randint(0, VOCAB, (*tokens.ids.shape, 3))
        inputs.append((tokens, ids, scored(model, "padded", tokens, ids)))
    compile_layers(model)
    for tokens, ids, (values, gradients) in inputs:
        got, found = scored(model, "padded", tokens, ids)
        torch.testing.assert_close(got, values, atol=2e-5, rtol=1e-5)
        for mine, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    once = compiled_frames() - before
    assert once > 0
    for tokens, ids, _ in inputs:
        scored(model, "padded", tokens, ids)
        scored(copy.deepcopy(model), "padded", tokens, ids)
    assert compiled_frames() - before == once


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sharded_student_learns_the_same(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, batch, losses = init_device_mesh("cpu", (1,)), random_experience(5), {}
        for compiled in (False, True):
            scorer = Scorer(tiny_model())
            if compiled:
                compile_layers(scorer.model)
            shard(scorer, mesh)
            optimizer, losses[compiled] = torch.optim.SGD(scorer.parameters(), lr=0.05), []
            for _ in range(3):
                with unsharded(scorer):
                    scorer(batch.rollout.tokens, Want(taken=True))
                logp = scorer(batch.rollout.tokens, Want(taken=True)).taken_logp
                loss = -logp.sum() / batch.rollout.mask.sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[compiled].append(float(loss.detach()))
    finally:
        dist.destroy_process_group()
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][2] < losses[True][0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_learns_the_same(tmp_path):
    before = compiled_frames()
    plain = here("train", "debug=fast", folder=tmp_path / "plain")
    assert compiled_frames() == before
    done = here("train", "debug=fast", "student.compile=true", folder=tmp_path / "compiled")
    assert compiled_frames() > before
    assert done.losses == pytest.approx(plain.losses, rel=1e-3)
    assert done.summary["response_tokens"] == plain.summary["response_tokens"]
