"""Another choice over a preset: a schedule replaces a schedule, and a leftover key is named with its remedy."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from commands.running import here
from commands.test_configuration import composed
from opd_lightning.commands import build, refused
from opd_lightning.errors import ConfigError
from opd_lightning.overrides import dictionaries_replace

STEP = "{_target_: opd_lightning.schedule.Step, before: 1, after: 0, at: 0.5}"
LINEAR = "{_target_: opd_lightning.schedule.Linear, start: 0, end: 1}"
AS_STEP, AS_LINEAR = yaml.safe_load(STEP), yaml.safe_load(LINEAR)


@pytest.mark.parametrize(
    ("words", "group", "named", "remedy"),
    [
        (["experiment=tropd", "support=full"], "support", "support", "'~support.k'"),
        (["experiment=gkd", "divergence=reverse_kl"], "estimator", "divergence", "'~divergence.beta'"),
        (
            ["experiment=distillm2", "rollout=esr"],
            "rollout",
            "rollout",
            "'~rollout.on_policy' '~rollout.text'",
        ),
        (
            ["regularizer=[imitation]", "+regularizer.imitation.k=1"],
            "regularizer.imitation",
            "regularizer.imitation",
            "'~regularizer.imitation.k'",
        ),
        (
            ["experiment=tropd", "+rollout.fraction.at=1"],
            "rollout",
            "rollout.fraction",
            "'~rollout.fraction.at'",
        ),
    ],
)
def test_a_key_that_the_chosen_part_does_not_take(words, group, named, remedy):
    config = composed(*words)
    with pytest.raises(ConfigError) as refusal:
        build(OmegaConf.select(config, group))
    sentence = str(refusal.value)
    assert sentence.startswith(f"`{named}` must hold what ")
    assert f"; add {remedy} where" in sentence
    removed = [word.strip("'") for word in remedy.split()]
    build(OmegaConf.select(composed(*words, *removed), group))


def test_a_part_that_is_completed_later():
    """Its class is called by the training alone, and the sentence is the same."""
    sentence = str(refused(composed("+optimizer.nonsense=1").optimizer, TypeError()))
    assert "got nonsense as well; add '~optimizer.nonsense' where" in sentence
    assert "settings that it refuses (lr)" in str(refused(composed().optimizer, ValueError("lr")))


class TestASchedule:
    def found(self, *words: str) -> Any:
        with dictionaries_replace():
            return OmegaConf.to_container(composed(*words).rollout, resolve=False)

    @pytest.mark.parametrize("sign", ["", "++"])
    def test_replaces_another(self, sign):
        assert self.found("experiment=tropd", f"{sign}rollout.fraction={STEP}")["fraction"] == AS_STEP

    def test_keeps_nothing_of_another_of_its_class(self):
        """The one of the yaml ends at a quarter of the run, the one given says no such thing."""
        assert self.found("rollout=geometric", f"rollout.epsilon={LINEAR}")["epsilon"] == AS_LINEAR

    def test_replaces_a_number_and_a_reference_to_another_key(self):
        found = self.found("rollout=esr", f"rollout.loss_horizon={LINEAR}", f"rollout.top_p={STEP}")
        assert found["loss_horizon"] == AS_LINEAR
        assert found["top_p"] == AS_STEP
        assert found["max_new_tokens"] == 100

    def test_is_followed_by_later_overrides(self):
        words = ["experiment=tropd", f"rollout.fraction={STEP}", "rollout.fraction.at=0.25"]
        assert self.found(*words)["fraction"] == AS_STEP | {"at": 0.25}

    def test_of_a_key_that_is_not_there(self):
        with pytest.raises(ConfigCompositionException, match=r"Could not override 'rollout.fractoin'"):
            self.found(f"rollout.fractoin={STEP}")

    def test_of_no_number_on_a_command_line(self, models_stay_closed, tmp_path):
        words = ["experiment=tropd", f"rollout.fraction={STEP.replace('before: 1', 'before: .inf')}"]
        sentence = here("train", *words, folder=tmp_path / "run").sentence
        assert sentence.startswith("error: `schedule.before` must be a number, got '.inf'; ")

    def test_in_a_multirun(self, tmp_path, monkeypatch):
        """Two jobs with a schedule each, recorded as they were written."""
        monkeypatch.chdir(tmp_path)
        small = ["evaluation.settings.problems=1", "evaluation.teacher=false", "callbacks=[]", "logger=[csv]"]
        places = ["hydra.sweep.dir=jobs", "hydra.sweep.subdir=${hydra:job.num}"]
        words = ["-m", "experiment=tropd", "debug=fast", f"rollout.fraction={STEP},{LINEAR}"]
        done = here("train", *words, *small, *places, folder=tmp_path / "run")
        assert done.code == 0, done.err
        configs = [yaml.safe_load((tmp_path / f"jobs/{n}/config.yaml").read_text()) for n in (0, 1)]
        assert [config["rollout"]["fraction"] for config in configs] == [AS_STEP, AS_LINEAR]
        summary = (tmp_path / "jobs/0/summary.json").read_text()
        assert summary.count("rollout.fraction=") == 1
        assert "~rollout" not in summary


def test_hydra_is_as_before():
    before = ConfigLoaderImpl._apply_overrides_to_config
    with dictionaries_replace():
        assert ConfigLoaderImpl._apply_overrides_to_config is not before
    assert ConfigLoaderImpl._apply_overrides_to_config is before
