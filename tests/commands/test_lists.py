"""Parts taken out of a preset's list, and parts that would teach nothing."""

import pytest

from commands.running import here
from opd_lightning.building import objective_from

from .test_configuration import LISTED, PRESETS, composed

TAKEN_OUT = [
    (preset, group, names, tuple(n for n in names if n != out))
    for preset in PRESETS
    for group in sorted(set(LISTED) & {"regularizer", "mask"})
    if (names := tuple(composed(f"experiment={preset}").get(group) or ()))
    for out in names
]
UNTAUGHT = {
    ("experiment=tropd", "rollout.text=data"): ("regularizer imitation", "teacher", "data or student"),
    ("experiment=stable_opd", "rollout.gold=teacher"): (
        "regularizer imitation",
        "data",
        "student or teacher",
    ),
    ("experiment=sft_pool", "regularizer=[reference_kl]"): ("regularizer reference_kl", "student", "teacher"),
    ("rollout=teacher_text", "support=teacher"): ("estimator TopK", "student", "teacher"),
}


@pytest.mark.parametrize(("preset", "group", "names", "left"), TAKEN_OUT, ids=str)
def test_a_preset_without_one_of_its_parts(preset, group, names, left, caplog):
    """The ablation that every paper shows: its settings in the preset go with it, and that is said."""
    (out,) = set(names) - set(left)
    config = composed(f"experiment={preset}", f"{group}=[{','.join(left)}]")
    with caplog.at_level("INFO"):
        objective = objective_from(config)
    built = objective.regularizers if group == "regularizer" else objective.masks
    assert tuple(built) == left
    said = [record.getMessage() for record in caplog.records]
    settings = out in (config.get(group) or {})
    assert any(f"{group}.{out} is not in the list" in line for line in said) == settings


def test_the_ablations_are_there():
    assert {("stable_opd", "regularizer"), ("tropd", "regularizer"), ("reopold", "mask")} <= {
        (preset, group) for preset, group, *_ in TAKEN_OUT
    }


@pytest.mark.parametrize("words", UNTAUGHT, ids=" ".join)
@pytest.mark.usefixtures("models_stay_closed")
def test_a_part_with_nobody_s_tokens_to_teach_is_refused(words, tmp_path):
    part, wants, found = UNTAUGHT[words]
    sentence = here("train", *words, folder=tmp_path / "run").sentence
    assert f"tokens that {part} teaches, written by {wants}, got tokens of {found} alone" in sentence
