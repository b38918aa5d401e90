"""Memory from shapes: against what autograd keeps, and against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from commands.own import save_model
from tiny import tiny_model

from opd_lightning.divergence.reverse_kl import ReverseKL
from opd_lightning.errors import ConfigError
from opd_lightning.estimator.topk import TopK
from opd_lightning.lora import Lora
from opd_lightning.models import load_model
from opd_lightning.objective import Objective
from opd_lightning.planning.cost import cost
from opd_lightning.planning.memory import Memory, activation_bytes, kept_bytes, memory
from opd_lightning.planning.run import Frozen, PlannedRun, Sharding
from opd_lightning.planning.settings import (
    Assumptions,
    lengths,
    planned_run,
    quantised_bytes,
    sharding,
    state_share,
    world,
)
from opd_lightning.planning.shapes import ModelShape
from opd_lightning.reduction.token_mean import TokenMean
from opd_lightning.rollout.student import StudentRollout
from opd_lightning.schedule import Linear
from opd_lightning.support.full import Full
from opd_lightning.support.teacher import TeacherTopK

ADAM = partial(torch.optim.AdamW, lr=1e-3)
SHAPE = ModelShape.of(tiny_model())
MB = 2**20


def planned(**changes) -> PlannedRun:
    """A run of one process on a CPU: 2 optimizer steps of 4 responses on each of 3 collections."""
    plain = PlannedRun(
        student=SHAPE,
        width=4.0,
        compute="float32",
        frozen=(Frozen(role="teacher", shape=SHAPE, width=2.0),),
        optimizer_states=2.0,
        optimizer_fused=False,
        sharding=Sharding(name="auto", buckets=True),
        processes=1,
        nodes=1,
        device="cpu",
        checkpointing=False,
        prompts=8,
        collection_steps=2,
        samples=1,
        steps=6,
        accumulate=1,
        micro_batch_tokens=None,
        prompt_tokens=10,
        longest=20,
        mean=15.0,
        support=4,
        full=False,
        exact_learning=False,
        student_scored=False,
        probe_rows=0,
        score_rows=32,
        score_tokens=None,
        scratch=256.0 * MB,
        writers=frozenset({"student"}),
        engine="here",
        engine_rows=128,
        engine_cache=None,
        evaluations=2,
        evaluation_rows=3,
        evaluation_tokens=20,
        runtime=0.0,
    )
    return replace(plain, **changes)


def kept_by_autograd(model, rows: int, length: int, autocast: bool) -> int:
    """Return the bytes that a forward keeps for its backward, weights left out and each memory counted once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model.base_model(input_ids=ids, use_cache=False)[0]
    del states
    return sum(memory.nbytes() for memory in kept.values())


@pytest.mark.parametrize("compute", ["float32", "mixed", "half"])
@pytest.mark.parametrize(
    ("family", "more"), [("qwen2", 0.05), ("qwen3", 0.05), ("llama", 0.05), ("gemma3", 0.25)]
)
def test_activations_are_what_autograd_keeps(tmp_path, family, more, compute):
    sizes = {"hidden_size": 48, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    dtype = "bfloat16" if compute == "half" else "float32"
    model = load_model(str(save_model(tmp_path, family, **sizes)), "student.path", dtype).train()
    shape = ModelShape.of(model)
    kept = kept_by_autograd(model, 16, 96, compute == "mixed")
    estimate = kept_bytes(shape, 16 * 96, compute, False)
    assert abs(estimate / kept - 1) < more, f"{estimate / kept:.3f}"


def test_activations_grow_with_tokens_and_shrink_with_checkpointing():
    assert activation_bytes(SHAPE, 200, "float32") == 2 * activation_bytes(SHAPE, 100, "float32")
    # Two layers of 32 wide states in float32, and one of the two layers (the end's states halved with it).
    whole = activation_bytes(SHAPE, 100, "float32")
    assert kept_bytes(SHAPE, 100, "float32", True) == 100 * 2 * 32 * 4 + whole / 2


def test_a_shape_without_weights_is_the_models_own(tmp_path):
    for tied in (True, False):
        path = str(save_model(tmp_path / str(tied), "qwen3", tie_word_embeddings=tied))
        empty, loaded = (
            ModelShape.at(path, "student.path"),
            ModelShape.of(load_model(path, "student.path")),
        )
        assert empty == loaded
        assert empty.tied is tied
        assert empty.weights == sum(p.numel() for p in load_model(path, "student.path").parameters())


def test_adapters_alone_are_trained():
    lora = Lora(rank=2, alpha=4, dropout=0.0, target_modules=["q_proj"])
    path = "builtin:word_problems/student"
    shape, plain = ModelShape.at(path, "student.path", lora), ModelShape.at(path, "student.path")
    # Three layers, A of 2 x 96 and B of 96 x 2 each.
    assert shape.trained == 3 * 2 * (96 + 96)
    assert shape.weights == plain.weights + shape.trained


def test_what_is_held_by_hand():
    held = memory(planned()).held
    n = SHAPE.weights
    assert held["student weights"] == 4 * n
    assert held["gradients"] == 4 * n
    assert held["optimizer state"] == 8 * n
    assert held["teacher weights"] == 2 * n
    # 8 responses: 10 prompt ids with mask; 20 positions of 38 bytes, and 4 support ids of 13 each.
    assert held["experience"] == 8 * (10 * 9 + 20 * (38 + 4 * 13))


@pytest.mark.parametrize(
    ("strategy", "divided", "kept"),
    [
        ({"name": "auto"}, [], 2),
        ({"_target_": "lightning.pytorch.strategies.DDPStrategy"}, [], 2),
        (
            {"_target_": "opd_lightning.strategies.fsdp"},
            ["student weights", "gradients", "optimizer state"],
            1,
        ),
        ({"_target_": "x.DeepSpeedStrategy", "stage": 2}, ["gradients", "optimizer state"], 1),
        (
            {"_target_": "x.DeepSpeedStrategy", "stage": 3},
            ["student weights", "gradients", "optimizer state"],
            1,
        ),
    ],
)
def test_a_strategy_divides_what_it_shards(strategy, divided, kept):
    alone = memory(planned(sharding=sharding(strategy))).held
    eight = memory(planned(sharding=sharding(strategy), processes=4)).held
    for part in ("student weights", "gradients", "optimizer state"):
        copies = kept if part == "gradients" else 1
        assert eight[part] == alone[part] / 4 if part in divided else eight[part] == copies * alone[part]
    assert eight["teacher weights"] == alone["teacher weights"]


def test_weights_are_whole_during_a_collection_alone():
    run = planned(sharding=Sharding(name="fsdp", weights=True, gradients=True, optimizer=True), processes=4)
    phases = memory(run).phases
    assert phases["generate"]["gathered weights"] == SHAPE.weights * 4 * 3 / 4
    wide = replace(run.student, layers=20, weights=20 * run.student.layer)
    assert memory(replace(run, student=wide)).phases["learn"]["gathered weights"] == 2 * SHAPE.layer * 4


def test_parts_add_up_to_the_peak_of_the_worst_phase():
    found = memory(planned())
    assert isinstance(found, Memory)
    assert sum(found.parts.values()) == found.peak
    assert found.peak == sum(found.held.values()) + max(sum(p.values()) for p in found.phases.values())
    small = planned(prompts=800, accumulate=400, checkpointing=True, prompt_tokens=1000, score_rows=1)
    assert memory(small).worst == "generate"
    assert memory(planned(prompt_tokens=2000, score_rows=1)).worst == "learn"


def test_gradients_make_room_for_the_backward_pass_of_a_whole_step():
    """4 rows of 30 tokens: MLP and states of a layer, and the head's gradient beside it as it is tied."""
    assert SHAPE.tied
    layer = 4 * 30 * 4 * (3 * SHAPE.inner + 2 * SHAPE.hidden)
    head = SHAPE.vocab * SHAPE.hidden * 4
    cut = memory(planned(accumulate=2)).phases["learn"]
    assert cut["backward's own"] == layer / 2 + head
    whole = memory(planned()).phases["learn"]
    assert whole["backward's own"] == max(0, layer + head - SHAPE.weights * 4)
    untied = replace(SHAPE, tied=False)
    assert memory(planned(student=untied, accumulate=2)).phases["learn"]["backward's own"] == max(
        layer / 2, head
    )


def test_ranking_ids_wants_whole_rows_of_logits():
    """20,000 logits: 256 rows in two buffers, and of each row 4 blocks of 64 ids with places and values."""
    wide = replace(SHAPE, vocab=20_000)
    score = memory(planned(student=wide, longest=40)).phases["score"]
    assert score["head scratch"] == 2 * 4 * 20_000 * 256 + 256 * 4 * 64 * 20
    assert "one forward" not in score
    # Eight rows of 40 positions are 320; with 10 there are 80 to rank.
    assert memory(planned(student=wide, longest=10)).phases["score"]["head scratch"] == 80 * (160_000 + 5120)
    # 10,000 tokens through the layers are more than that.
    assert "one forward" in memory(planned(student=wide, prompt_tokens=10_000)).phases["score"]


def test_logits_in_large_blocks_come_beside_what_learning_has_left():
    """256 rows of 40,000 logits are 41 MB, a block of their own on a CPU; of 20,000 they are not."""
    wide = replace(SHAPE, vocab=40_000)
    found = memory(planned(student=wide, longest=40)).phases
    assert found["score"]["left of learning"] == found["learn"]["activations"]
    for run in (
        planned(student=replace(wide, vocab=20_000), longest=40),
        planned(student=wide, longest=40, device="cuda"),
        planned(student=replace(wide, inner=2**16), longest=40),
    ):
        assert "left of learning" not in memory(run).phases["score"]


def test_the_decoder_joins_small_matrices():
    generate = memory(planned()).phases["generate"]
    each = SHAPE.hidden * (SHAPE.query + 2 * SHAPE.key + 2 * SHAPE.inner)
    assert generate["joined weights"] == SHAPE.layers * each * 4
    large = replace(SHAPE, hidden=4096, inner=4096, query=4096, key=64)
    assert memory(planned(student=large)).phases["generate"]["joined weights"] == 0
    rounded = memory(planned(compute="mixed")).phases["generate"]["joined weights"]
    assert rounded == 2 * (SHAPE.body + SHAPE.vocab * SHAPE.hidden)


def test_answers_to_held_out_problems_may_have_the_larger_cache():
    """8 responses of 30 tokens are collected; 100 of 10 + 500 come in blocks of 256: 510 slots and 256 before."""
    run = planned(evaluation_rows=100, evaluation_tokens=500)
    row = 2 * SHAPE.layers * SHAPE.key * 4
    assert memory(run).phases["generate"]["key-value cache"] == row * 100 * (510 + 256)
    assert memory(planned()).phases["generate"]["key-value cache"] == row * 8 * 30


def test_a_fused_optimizer_makes_no_copies():
    assert memory(planned(optimizer_fused=True)).phases["step"]["optimizer's own"] == 0
    assert memory(planned()).phases["step"]["optimizer's own"] == 2 * SHAPE.ends * 4
    run = configured()
    assert not run.optimizer_fused
    fused = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    assert planned_run(VALUES, objective_of(4), drawn(20), fused, assumed()).optimizer_fused


def test_an_allocator_keeps_a_share_of_what_is_made_but_of_matrices_of_32_mib():
    found = memory(planned())
    made = found.held["gradients"] + found.held["optimizer state"] + found.held["experience"]
    step = found.phases["step"]
    assert step["allocator"] == pytest.approx(0.15 * (made + step["optimizer's own"]))
    wide = replace(SHAPE, vocab=2**23 // SHAPE.hidden, ends=2**23, body=2**20)
    held, gaps = memory(planned(student=wide)).held, memory(planned(student=wide)).phases["step"]
    made = (held["gradients"] + held["optimizer state"]) / 9 + held["experience"]
    assert gaps["allocator"] == pytest.approx(0.15 * (made + gaps["optimizer's own"]))


def test_an_offloaded_teacher_is_on_the_device_while_it_scores():
    teacher = Frozen(role="teacher", shape=SHAPE, width=2.0, host=True)
    found = memory(planned(frozen=(teacher,)))
    assert "teacher weights" not in found.held
    assert found.host["teacher weights"] == found.phases["score"]["teacher from the CPU"] == 2 * SHAPE.weights


def test_a_sharded_teacher_is_divided_and_fetched_layer_by_layer():
    teacher = Frozen(role="teacher", shape=SHAPE, width=2.0, divided=True)
    found = memory(planned(frozen=(teacher,), processes=4))
    assert found.held["teacher weights"] == 2 * SHAPE.weights / 4
    most = max(2 * SHAPE.layer, SHAPE.ends)
    assert found.phases["score"]["teacher, gathered"] == 2 * min(most, SHAPE.weights * 3 / 4) > 0
    alone = memory(planned(frozen=(teacher,)))
    assert alone.held["teacher weights"] == 2 * SHAPE.weights
    assert "teacher, gathered" not in alone.phases["score"]


@pytest.mark.parametrize(
    ("quantization", "size"),
    [
        (None, None),
        ({"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}, 1.06),
        ({"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig", "group_size": 32}, 0.56),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.56),
        ({"quant_method": "gptq", "bits": 4}, 0.56),
        ({"quant_method": "fp8"}, 1.06),
    ],
    ids=str,
)
def test_bytes_of_a_quantised_weight(quantization, size):
    assert quantised_bytes(quantization) == size


def test_tokens_by_hand():
    found = cost(planned(), 1.0, dict.fromkeys(("generate", "score", "train", "evaluate"), 0.5))
    assert (found.collections, found.prompts, found.responses) == (3, 24, 24)
    assert found.tokens == {
        "prompts": 240,
        "generate": 24 * 15,
        "score": 24 * 15,
        "train": 6 * 4 * 15,
        "evaluate": 2 * 3 * 20,
    }
    body, width, vocab = SHAPE.work.body, SHAPE.hidden, SHAPE.vocab
    # 6 N a token, and three products of 4 rows of the head at each position.
    assert found.operations["train"] == pytest.approx(24 * (6 * body * 25 + 6 * width * 4 * 15))
    assert found.operations["generate"] == pytest.approx(24 * (2 * body * 25 + 2 * width * vocab * 15))
    assert found.hours["train"] == pytest.approx(found.operations["train"] / 0.5e12 / 3600)
    assert cost(planned(processes=4), 1.0, dict.fromkeys(found.hours, 0.5)).total_hours == pytest.approx(
        found.total_hours / 4
    )


def test_prompts_divide_over_the_processes():
    with pytest.raises(ConfigError, match=r"a multiple of 3 prompts .* got 8; use 12"):
        planned(processes=3)


def test_an_optimizers_state_is_tried():
    assert state_share(ADAM) == pytest.approx(2.0, abs=0.01)
    assert state_share(partial(torch.optim.SGD, lr=1.0)) == 0.0
    assert state_share(partial(torch.optim.SGD, lr=1.0, momentum=0.9)) == 1.0


# -- from a configuration


def assumed(**changes) -> Assumptions:
    plain = {
        "prompt_tokens": None,
        "response_share": 1.0,
        "cpu_tflops": None,
        "gpu_tflops": 1.0,
        "utilisation": dict.fromkeys(("generate", "score", "train", "evaluate"), 0.3),
        "gpus_per_node": 8,
        "runtime_mb": 0,
    }
    return Assumptions(**plain | changes)


def drawn(longest) -> StudentRollout:
    return StudentRollout(
        samples=1,
        max_new_tokens=longest,
        loss_horizon=None,
        early_stop=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
    )


VALUES = {
    "student": {"path": "builtin:word_problems/student", "dtype": "float32", "head_scratch_mb": 256},
    "teacher": {"path": "builtin:word_problems/teacher", "dtype": "bfloat16"},
    "reference": {},
    "engine": {"_target_": "opd_lightning.engine.transformers.TransformersEngine", "batch_size": 16},
    "strategy": {"name": "auto"},
    "trainer": {
        "devices": 1,
        "num_nodes": 1,
        "accelerator": "cpu",
        "precision": "32-true",
        "max_steps": 6,
        "accumulate_grad_batches": 1,
    },
    "collector": {
        "prompts_per_collection": 8,
        "steps_per_collection": 2,
        "micro_batch_tokens": None,
        "max_prompt_tokens": 64,
        "probe_rows": 2,
        "score_rows": 4,
        "score_tokens": None,
    },
    "evaluation": {"every_steps": 2, "settings": {"problems": 4, "samples": 1, "max_new_tokens": 8}},
}


def objective_of(k: int) -> Objective:
    return Objective(
        estimator=TopK(divergence=ReverseKL(), form="renormalised"),
        support=TeacherTopK(k=k),
        reduction=TokenMean(),
    )


def configured(objective=None, **changes) -> PlannedRun:
    values = {name: VALUES[name] | changes.get(name, {}) for name in VALUES}
    return planned_run(values, objective or objective_of(4), drawn(20), ADAM, assumed())


def test_a_configuration_becomes_numbers():
    run = configured()
    assert (run.support, run.full, run.exact_learning, run.prompt_tokens) == (4, False, False, 64)
    assert [model.width for model in run.frozen] == [2.0]
    assert (run.longest, run.mean, run.evaluations, run.evaluation_rows) == (20, 20.0, 4, 8)
    whole = Objective(
        estimator=TopK(divergence=ReverseKL(), form="renormalised"), support=Full(), reduction=TokenMean()
    )
    run = configured(whole)
    assert (run.support, run.full, run.exact_learning) == (0, True, True)
    # The teacher's states of 128 numbers stand for ids and log-probs.
    assert memory(run).held["experience"] == 8 * (64 * 9 + 20 * (38 + 128 * 4))


def test_teachers_elsewhere_live_and_several():
    served = configured(teacher={"address": "http://127.0.0.1:1", "path": None})
    assert served.frozen == ()
    (live,) = configured(teacher={"weights": "live"}).frozen
    assert not live.copy
    paths = {"a": "builtin:word_problems/teacher", "b": {"path": "builtin:word_problems/student"}}
    several = configured(
        teacher={"teachers": paths, "default": "builtin:word_problems/teacher", "dtype": "float32"}
    )
    assert [model.shape.layers for model in several.frozen] == [4, 3, 4]


@pytest.mark.parametrize(
    ("devices", "nodes", "found"),
    [(8, 128, (1024, 128)), ("auto", 2, (16, 2)), ("4", 1, (4, 1)), ("0,1,", 1, (2, 1)), ([0, 3], 1, (2, 1))],
)
def test_processes_of_a_configuration(devices, nodes, found):
    values = {"trainer": {"devices": devices, "num_nodes": nodes, "accelerator": "gpu"}}
    assert world(values, assumed()) == found


def test_a_schedule_is_longest_at_an_end_and_counts_by_its_mean():
    assert lengths(drawn(Linear(start=10, end=30)), assumed(response_share=0.5)) == (30, pytest.approx(10.0))


def test_a_model_that_cannot_be_read_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"`student.path` must be a folder with a model"):
        configured(student={"path": str(tmp_path)})


@pytest.mark.parametrize(
    ("field", "value"),
    [("response_share", 0.0), ("gpu_tflops", -1.0), ("utilisation", {"train": 0.5}), ("prompt_tokens", 0)],
)
def test_an_assumption_out_of_range_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"`planning.{field}"):
        assumed(**{field: value})
