"""A score function on tokens that both models drew together: with importance weights, or not at all."""

import pytest

from commands.running import here

FAST = [
    "debug=fast",
    "rollout.max_new_tokens=6",
    "evaluation.settings.problems=1",
    "evaluation.teacher=false",
]


@pytest.mark.parametrize("rollout", ["linear_mix", "geometric"])
@pytest.mark.parametrize("estimator", ["token", "discounted", "sequence"])
@pytest.mark.parametrize("more", [[], ["regularizer=[ratio_clip]"]])
@pytest.mark.usefixtures("models_stay_closed")
def test_is_refused_without_weights(estimator, rollout, more, tmp_path):
    """numerics.md section 10: k1, policy gradient and another's tokens, under the student's name."""
    done = here("train", f"estimator={estimator}", f"rollout={rollout}", *more, folder=tmp_path / "run")
    kind = estimator.capitalize()
    assert f"`regularizer` must hold importance weights for estimator {kind}" in done.sentence
    assert "regularizer=[importance] regularizer.importance.of=sampler" in done.sentence


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=minillm"],
        ["rollout=geometric"],  # with topk, the default: TRB
        ["rollout=linear_mix", "estimator=token", "regularizer=[importance]"],
    ],
    ids=" ".join,
)
def test_trains(words, tmp_path):
    done = here("train", *words, *FAST, folder=tmp_path / "run")
    assert len(done.losses) == 2
