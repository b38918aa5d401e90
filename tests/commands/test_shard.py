"""``teacher.shard`` on a command line, by one process: what it refuses, and that it changes nothing."""

from __future__ import annotations

import pytest

from commands.running import here

SHARD = "teacher.shard=true"
SMALL = ["debug=fast", "rollout.max_new_tokens=8", "evaluation.settings.max_new_tokens=8",
         "logger=[csv]", "callbacks=[]"]  # fmt: skip


@pytest.mark.usefixtures("models_stay_closed")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["teacher.shard=2"], "`teacher.shard` must be true or false"),
        ([SHARD, "teacher.offload=cpu"], "`teacher.offload` must be null with teacher.shard=true"),
        ([SHARD, "teacher.quantization={quant_method: fp8}"], "`teacher.quantization` must be null with teacher.shard"),
        ([SHARD, "teacher.cache=scores"], "`teacher.cache` must be null with teacher.shard=true"),
        ([SHARD, "collector.score_tokens=4096"], "`collector.score_tokens` must be null with teacher.shard=true"),
        ([SHARD, "support=full"], "a served, cached, routed or sharded teacher (LocalTeacher)"),
        ([SHARD, "rollout=teacher_prefix", "rollout.fraction=0.1"], "`rollout` must be without a part for the teacher"),
        ([SHARD, "rollout=linear_mix"], "`rollout` must be without a part for the teacher's model"),
        (["teacher=router", "teacher.column=difficulty", "+teacher@teacher.teachers.a=builtin",
          "teacher.teachers.a.shard=true"], "`teacher.teachers.a.shard` must be false in a router"),
    ],
)  # fmt: skip
def test_refusals_before_a_model_is_opened(tmp_path, words, sentence):
    assert sentence in here("train", *words, folder=tmp_path / "run").sentence


@pytest.mark.usefixtures("models_stay_closed")
def test_a_server_is_one_process(tmp_path):
    said = here("serve_teacher", SHARD, folder=tmp_path / "run").sentence
    assert "`teacher.shard` must be false in a server" in said


def test_one_process_has_it_whole(tmp_path):
    """It says so in one line, and answers the held-out problems too."""
    plain = here("train", *SMALL, folder=tmp_path / "plain")
    done = here("train", *SMALL, SHARD, folder=tmp_path / "run")
    assert done.losses == plain.losses
    assert done.summary["teacher_accuracy"] == plain.summary["teacher_accuracy"] is not None
    assert done.out.count("whole: teacher.shard=true does nothing with one process") == 1
    assert "teacher.shard" not in plain.out
