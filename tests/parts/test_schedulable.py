"""Which numbers of the parts may be schedules, over every yaml: each number is in one of two lists."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from opd_lightning.errors import ConfigError
from opd_lightning.paths import CONF_DIR
from opd_lightning.schedule import Linear

# The method is in these groups; in the others are the machine, the data, the models and what a run reports.
METHOD = {"divergence", "estimator", "mask", "reduction", "regularizer"} | {
    "reward",
    "rollout",
    "support",
    "teacher",
}
OTHERS = {
    *("callbacks", "collector", "debug", "engine", "evaluation", "experiment", "logger", "optimizer", "reference"),
    *("planning", "scale", "scheduler", "strategy", "student", "student/lora", "task", "trainer"),
}  # fmt: skip
LISTED = {"mask", "regularizer"}
LENGTHS = {"max_new_tokens": (8, 64), "loss_horizon": (1, 64)}
# Two legal values of each number that may be a schedule.
SCHEDULABLE: dict[str, tuple[float, float]] = {
    "Discounted.gamma": (0.0, 1.0),
    "TailCorrected.tail_weight": (1.0, 5.0),
    "TailPublished.tail_weight": (1.0, 5.0),
    "TopK.origin_scale": (0.0, 1.0),
    "EntropyQuantile.share": (0.2, 1.0),
    **{f"{name}.count": (1, 100) for name in ("First", "Last", "Middle", "Random", "TopPositions")},
    "RewardFloor.floor": (-2.0, 0.0),
    "Tip.share": (0.5, 1.0),
    "TrajectoryFloor.share": (0.0, 0.2),
    "TwoPhases.floor": (-2.0, -1.0),
    "TwoPhases.share": (0.2, 0.5),
    **{f"{name}.coefficient": (0.0, 1.0) for name in ("EntropyGate", "Imitation", "ReferenceKL", "SignGate")},
    **{f"{name}.coefficient": (0.0, 1.0) for name in ("StepKL", "TrustRegion")},
    "EntropyGate.threshold": (0.5, 1.0),
    "Importance.band": (0.5, 0.9),
    "Importance.cap": (2.0, 5.0),
    "PastShare.gamma": (0.0, 0.5),
    "PositionWeight.center": (0.3, 0.5),
    "PositionWeight.least": (0.25, 1.0),
    "PositionWeight.width": (0.1, 0.2),
    "RatioClip.clip_high": (0.2, 0.3),
    "RatioClip.clip_low": (0.2, 0.3),
    "RatioClip.dual": (2.0, 3.0),
    "SignGate.threshold": (-1.0, 1.0),
    "TrustRegion.threshold": (-2.0, -1.0),
    "Extrapolated.scale": (1.0, 1.25),
    "Floor.floor": (-2.0, -1.0),
    "HardClip.limit": (1.0, 5.0),
    "LogMixture.alpha": (0.1, 1.0),
    "Power.alpha": (0.1, 1.0),
    **{f"{name}.{key}": ends for name in ("Coin", "GeometricMix", "LinearMix") for key, ends in LENGTHS.items()},
    **{f"{name}.{key}": ends for name in ("Mixture", "StudentRollout", "TeacherText") for key, ends in LENGTHS.items()},
    "TeacherPrefix.max_new_tokens": (8, 64),
    "Mixture.gold_horizon": (1, 64),
    "Coin.on_policy": (0.0, 1.0),
    "GeometricMix.epsilon": (0.0, 0.5),
    "LinearMix.alpha": (0.0, 0.2),
    "TeacherPrefix.fraction": (0.0, 1.0),
    "SelfTeacher.decay": (0.9, 0.999),
}  # fmt: skip
# One number for a whole run: counts of responses and ids, samplers' settings, what makes a divergence the one it is,
# and the moment of a switch.
PLAIN = {
    *("JSD.beta", "Skewed.alpha", "TwoPhases.switch"),
    *(f"{name}.k" for name in ("Augmented", "StudentAugmented", "StudentTopK", "TeacherTopK", "Union")),
    *("Mixture.student_samples", "Mixture.gold_samples"),
    *("Coin.teacher_temperature", "Mixture.teacher_temperature", "TeacherPrefix.teacher_temperature"),
    *(
        f"{name}.{key}"
        for name in ("ServedTeacher", "VllmTeacher")
        for key in ("timeout_s", "patience_s", "tokens_per_request", "scoring_temperature")
    ),
    *("LocalTeacher.scoring_temperature", "SelfTeacher.scoring_temperature", "SelfTeacher.max_prompt_tokens"),
    *(
        f"{name}.{key}"
        for name in ("Coin", "GeometricMix", "LinearMix", "Mixture", "StudentRollout", "TeacherPrefix", "TeacherText")
        for key in ("temperature", "top_p", "top_k", "min_p", "samples")
        if (name, key) != ("Mixture", "samples")
    ),
}  # fmt: skip
# Refused in these words, in a divergence, which is a key, and a sampler.
IN_WORDS = {name for name in PLAIN if name.split(".")[1] in {"beta", "alpha", "temperature", "top_p", "k"}}
# A setting that a field is read under alone, and the shape of one that holds several numbers.
UNDER: dict[str, dict[str, Any]] = {
    "TrustRegion.threshold": {"gate": "threshold"},
    "SelfTeacher.decay": {"weights": "ema"},
    "StudentRollout.max_new_tokens": {"loss_horizon": None},  # which may refer to it
}
SHAPES = {"TopK.origin_scale": lambda x: {"student": x}, "Importance.band": lambda x: [x, 2.0]}


def group_of(file: Path) -> str:
    return str(file.parent.relative_to(CONF_DIR))


def node_of(file: Path) -> DictConfig:
    """Return the part's settings, with what they refer to in the whole configuration."""
    around = {"reward": "log_ratio", "divergence": "reverse_kl"}
    root = {g: yaml.safe_load((CONF_DIR / g / f"{name}.yaml").read_text()) for g, name in around.items()}
    root |= {"student": {"path": "here", "dtype": "float32"}, "collector": {"max_prompt_tokens": 512}}
    group = file.parent.name
    root[group] = yaml.safe_load(file.read_text())
    config = OmegaConf.create(root)[group]
    config = config[file.stem] if group in LISTED else config
    config.pop("defaults", None)
    return config


def numbers() -> list[tuple[Path, str, str]]:
    """Return file, class and field of every number of a part, set or null, by the field's type."""
    found = []
    for file in sorted(CONF_DIR.rglob("*.yaml")):
        if group_of(file) in METHOD:
            node = node_of(file)
            module, _, name = node["_target_"].rpartition(".")
            fields = {f.name: f for f in dataclasses.fields(getattr(importlib.import_module(module), name))}
            found += [
                (file, name, key) for key in node
                if key in fields and re.search(r"\b(int|float)\b", str(fields[key].type))
            ]  # fmt: skip
    return found


NUMBERS = numbers()
linear = "opd_lightning.schedule.Linear"


def made(file: Path, name: str, key: str) -> Any:
    """Return what the part holds in a field that a schedule was put into."""
    field = f"{name}.{key}"
    low, high = SCHEDULABLE.get(field, (1, 2) if key in {"k", "top_k"} or "samples" in key else (0.2, 0.4))
    node = node_of(file)
    for other, value in UNDER.get(field, {}).items():
        node[other] = value
    node[key] = SHAPES.get(field, lambda x: x)({"_target_": linear, "start": low, "end": high})
    return getattr(instantiate(node, _convert_="all"), key)


def test_every_group_is_of_the_method_or_not():
    groups = {group_of(file) for file in CONF_DIR.rglob("*.yaml")} - {"."}
    assert groups == METHOD | OTHERS


def test_every_number_is_in_one_list():
    """A new coefficient is not forgotten."""
    found = {f"{name}.{key}" for _, name, key in NUMBERS}
    assert not SCHEDULABLE.keys() & PLAIN
    assert found == SCHEDULABLE.keys() | PLAIN


@pytest.mark.parametrize(
    ("file", "name", "key"),
    [entry for entry in NUMBERS if f"{entry[1]}.{entry[2]}" not in PLAIN],
    ids=lambda x: x.stem if isinstance(x, Path) else x,
)
def test_a_schedule_between_two_legal_values_is_accepted(file, name, key):
    low, high = SCHEDULABLE[f"{name}.{key}"]
    held = made(file, name, key)
    held = held["student"] if isinstance(held, dict) else held[0] if isinstance(held, tuple) else held
    assert held == Linear(start=low, end=high)


@pytest.mark.parametrize(
    ("file", "name", "key"),
    [entry for entry in NUMBERS if f"{entry[1]}.{entry[2]}" in IN_WORDS],
    ids=lambda x: x.stem if isinstance(x, Path) else x,
)
def test_a_schedule_of_another_number_is_refused(file, name, key):
    def make():
        try:
            made(file, name, key)
        except InstantiationException as error:
            raise error.__cause__ from None

    with pytest.raises(ConfigError, match=rf"`\w+\.{key}` must be a number, not a schedule, got Linear"):
        make()
