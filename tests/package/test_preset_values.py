"""Presets are what the papers say: every row is typed from a page of methods, none is read off a yaml.

The pages are local_support_matching.md (lsm), esr.md, tropd.md, stable_opd.md and frontier.md; a section of theirs
stands above each row. Numbers that no page has ("ours", "not published") are not pinned.
"""

from __future__ import annotations

from typing import Any

import pytest
from commands.test_configuration import PRESETS, composed
from omegaconf import DictConfig, OmegaConf

LINEAR, COSINE = "Linear", "Cosine"


def reading(config: DictConfig, key: str) -> Any:
    """Return what a dotted key holds: a class by its name, a list of parts by their names in order."""
    above, _, last = key.rpartition(".")
    holder = OmegaConf.select(config, above) if above else config
    if key in ("regularizer", "mask"):
        return list(holder.get(key, {}))
    if last not in holder:
        return "absent"
    value = holder[last]
    if isinstance(value, DictConfig):
        return value._target_.rpartition(".")[2]
    return list(value) if OmegaConf.is_list(value) else value


def score(support: str = "NoSupport", reward: str = "LogRatio", **more: Any) -> dict[str, Any]:
    """Return the classes of a policy gradient on the sampled token, one token mean for all."""
    chosen = {"estimator": "Token", "reward": reward, "support": support, "reduction": "TokenMean"}
    kept = {"estimator.gradient": "score", "estimator.baseline": "none", "estimator.normalise": "none"}
    return chosen | kept | {"rollout": "StudentRollout", "regularizer": [], "mask": [], **FROZEN, **more}


def direct(support: str, divergence: str = "ReverseKL", **more: Any) -> dict[str, Any]:
    """Return the classes of a divergence on a support, differentiated, with no policy-gradient term."""
    chosen = {"estimator": "TopK", "divergence": divergence, "support": support, "reduction": "TokenMean"}
    kept = {"estimator.form": "renormalised", "estimator.gradient": "direct"}
    return chosen | kept | {"rollout": "StudentRollout", "regularizer": [], "mask": [], **FROZEN, **more}


FROZEN = {"teacher": "LocalTeacher", "reduction.per_origin": False}
UNTRUNCATED = {"rollout.temperature": 1.0, "rollout.top_p": 1.0}
# lsm 4: T = 1, top-p 0.9 for local support matching only, K = 32; lsm 3 (1): top-k off
MATCHING = {"rollout.temperature": 1.0, "rollout.top_p": 0.9, "rollout.top_k": 0, "support.k": 32}
# lsm 2.1: raw head and sampled tail; lsm 3: V4 and V5 normally with the tail weight (its bounds are not printed)
TAIL = {"estimator": "TailPublished", "divergence": "absent", "estimator.tail_weight": float("inf")}
TAIL |= {"estimator.form": "absent", "estimator.gradient": "absent"}
# esr 1, 2, 3: exact RKL, mean of a response then over responses, T .7, top-p .95, no loss on the stop decision,
# one step a collection of 16 trajectories, one of each prompt; README: reverse KL over the full vocabulary
ESR = direct("Full", reduction="SequenceMean", mask=["stop_token"])
ESR |= {"rollout.temperature": 0.7, "rollout.top_p": 0.95, "rollout.samples": 1}
ESR |= {"collector.steps_per_collection": 1, "collector.prompts_per_collection": 16}
# tropd A2: Bernoulli gate; A3: outlier forward KL on K = 64, beta = .001; A4: 4 continuations, a prefix that
# follows a cosine from 1 to 0 over all steps; A5: T = 1, top-p 1; A7: one token mean over all tokens
TROPD = score("TeacherTopK", rollout="TeacherPrefix") | UNTRUNCATED
TROPD |= {"support.k": 64, "rollout.samples": 4, "rollout.text": "teacher"}
TROPD |= {"rollout.fraction": COSINE, "rollout.fraction.start": 1.0, "rollout.fraction.end": 0.0}
TROPD |= {"regularizer.trust_region.gate": "bernoulli", "regularizer.trust_region.outlier": "forward_kl"}
TROPD |= {"regularizer.trust_region.coefficient": 1.0, "regularizer.trust_region.threshold": None}
TROPD |= {"regularizer.imitation.coefficient": 0.001, "regularizer.imitation.origins": ["teacher"]}
# Cross-entropy alone: no divergence, reward or regularizer beside it.
CROSS_ENTROPY: dict[str, Any] = {"estimator": "Likelihood", "support": "NoSupport", "divergence": "absent"}
CROSS_ENTROPY |= {"reward": "absent", "regularizer": [], "mask": [], "reduction": "TokenMean"}

VALUES: dict[str, dict[str, Any]] = {
    # lsm 2 (LSM: teacher's top-K, renormalised on both sides, RKL, mean of all tokens), 4
    "local_support_matching": direct("TeacherTopK") | MATCHING,
    # lsm 2.1, V1: the default, the same
    "local_support_matching_v1": direct("TeacherTopK") | MATCHING,
    # lsm 2.1, V2: student's top-K and y_t, renormalised
    "local_support_matching_v2": direct("StudentAugmented") | MATCHING,
    # lsm 2.1, V3: teacher's top-K and y_t, renormalised
    "local_support_matching_v3": direct("Augmented") | MATCHING,
    # lsm 2.1, V4: student's top-K, raw head and sampled tail
    "local_support_matching_v4": direct("StudentTopK") | MATCHING | TAIL,
    # lsm 2.1, V5: teacher's top-K, raw head and sampled tail
    "local_support_matching_v5": direct("TeacherTopK") | MATCHING | TAIL,
    # lsm 2 (sampled token), 3 (6: no whitening, no baseline), 4 (top-p 1.0, T 1)
    "sampled_token": score() | UNTRUNCATED,
    # esr 1: N = 100, generation and loss stop at the same N; a stop there is no truncation (9.8)
    "esr": ESR | {"rollout.max_new_tokens": 100, "rollout.loss_horizon": 100, "rollout.early_stop": True},
    # esr 6: the loss horizon grows from 1 with the steps, generation stays
    "esr_progressive": ESR
    | {"rollout.loss_horizon": LINEAR, "rollout.loss_horizon.start": 1, "rollout.early_stop": False},
    # tropd A3, A7 tropd_paper: direct, the teacher as it is
    "tropd": TROPD
    | {"regularizer": ["trust_region", "imitation"], "regularizer.trust_region.gradient": "direct"}
    | {"regularizer.trust_region.teacher_renormalised": False, "regularizer.imitation.gradient": "direct"}
    | {"regularizer.imitation.biased": False},
    # tropd A5 (PPO, scalar advantages), A6 (the prefix leads away), A7 tropd_code (top-64 renormalised), ppo(0.2)
    "tropd_as_coded": TROPD
    | {"regularizer": ["trust_region", "ratio_clip", "imitation"]}
    | {"regularizer.trust_region.gradient": "scalar", "regularizer.trust_region.teacher_renormalised": True}
    | {"regularizer.ratio_clip.clip_low": 0.2, "regularizer.ratio_clip.clip_high": 0.2}
    | {"regularizer.imitation.gradient": "scalar", "regularizer.imitation.biased": True},
    # tropd B: floor at lambda .3 by (a); phase I drops below the floor, phase II keeps beta = .2 by entropy, the clip
    # stays on; switch at 150 of 300; the ratio u times the reward; selected tokens as denominator
    "reopold": score(reward="Floor", regularizer=["importance"], mask=["two_phases"])
    | {"reward.floor": -1.72, "mask.two_phases.floor": -1.72, "mask.two_phases.share": 0.2}
    | {"mask.two_phases.switch": 0.5, "regularizer.importance.of": "policy"},
    # tropd C: PPO on all tokens, plus alpha = 1 times FKL on k = 16 where H_T > .8, teacher renormalised (paper); T 1
    "eopd": score("TeacherTopK", regularizer=["ratio_clip", "entropy_gate"])
    | UNTRUNCATED
    | {"support.k": 16, "rollout.samples": 1, "regularizer.entropy_gate.threshold": 0.8}
    | {"regularizer.entropy_gate.coefficient": 1.0, "regularizer.entropy_gate.teacher_renormalised": True},
    # tropd D: theta = 0; K and the coefficient are not published
    "aopd": score("TeacherTopK", regularizer=["sign_gate"]) | {"regularizer.sign_gate.threshold": 0.0},
    # stable_opd 1 (clipped surrogate, mean of a response, then of responses), 4 (4 student and 1 gold response of the
    # data; KL(S||R) and SFT on the gold, each a mean of its own), 5 (T 1); lambda and beta are not published
    "stable_opd": score(rollout="Mixture", regularizer=["ratio_clip", "reference_kl", "imitation"])
    | {"reduction": "SequenceMean", "reduction.per_origin": True, "reference": "Initial"}
    | {"rollout.student_samples": 4, "rollout.gold_samples": 1, "rollout.gold": "data"}
    | {"rollout.temperature": 1.0, "regularizer.imitation.origins": ["data"]}
    | {"regularizer.imitation.gradient": "direct"},
    # frontier 1: lambda .5, JSD beta .5, T .9, full vocabulary; data or the student by a coin
    "gkd": direct("Full", "JSD", rollout="Coin")
    | {"rollout.on_policy": 0.5, "rollout.text": "data", "rollout.temperature": 0.9}
    | {"divergence.beta": 0.5, "estimator.origins": ["student", "data"]},
    # frontier 1: length-normalised whitened returns, PPO clip, single-step RKL, IS weights, alpha = .2
    "minillm": score("Full", estimator="Discounted", rollout="LinearMix")
    | {"regularizer": ["importance", "ratio_clip", "step_kl"], "rollout.alpha": 0.2}
    | {"estimator.gradient": "absent", "estimator.normalise": "length_whiten"}
    | {"regularizer.importance.of": "sampler", "regularizer.step_kl.coefficient": 1.0},
    # frontier 1: (2 - beta) SKL on teacher text, beta SRKL on student text, beta -> 1.5; alpha at most .1
    "distillm2": direct("Full", "Skewed", rollout="Coin")
    | {"rollout.text": "teacher", "estimator.origins": ["student", "teacher"]}
    | {"divergence.alpha": 0.1, "divergence.direction": "reverse", "estimator.other_divergence": "Skewed"}
    | {"estimator.other_divergence.alpha": 0.1, "estimator.other_divergence.direction": "forward"}
    | {"estimator.origin_scale.student": LINEAR, "estimator.origin_scale.student.end": 1.5}
    | {"estimator.origin_scale.teacher": LINEAR, "estimator.origin_scale.teacher.end": 0.5},
    # frontier 1: A = r, no discount, importance-sampling loss
    "thinking_machines": score(regularizer=["importance"]) | {"regularizer.importance.of": "policy"},
    # frontier 2: lambda = 1.25, R the student's initialisation, token-IS cap 5
    "exopd": score(reward="Extrapolated", regularizer=["importance"])
    | {"reward.scale": 1.25, "reference": "Initial"}
    | {"regularizer.importance.cap": 5.0, "regularizer.importance.of": "policy"},
    # frontier 2: A = T^alpha - S^alpha; alpha is swept, so ours
    "power_opd": score(reward="Power"),
    # frontier 2: gamma = .5
    "iw_opd": score(regularizer=["past_share"]) | {"regularizer.past_share.gamma": 0.5},
    # frontier 3: loss on the first L tokens, L grows by steps from there; the numbers are the built-in task's
    "fast_opd": score() | {"rollout.max_new_tokens": LINEAR, "rollout.loss_horizon": LINEAR},
    # frontier 4: same model, full-vocabulary JSD beta = .5, teacher fixed, T 1.1, top-p .95, top-k 20
    "opsd": direct("Full", "JSD", teacher="SelfTeacher")
    | {"teacher.weights": "initial", "divergence.beta": 0.5, "teacher.solution": "response"}
    | {"rollout.temperature": 1.1, "rollout.top_p": 0.95, "rollout.top_k": 20},
    # No page: baselines of ours, by what their names say.
    "sft_fresh": CROSS_ENTROPY | {"rollout": "TeacherText", "rollout.fixed": False},
    "sft_pool": CROSS_ENTROPY | {"rollout": "TeacherText", "rollout.fixed": True},
    "self_train": CROSS_ENTROPY | {"rollout": "StudentRollout", "estimator.origins": ["student"]},
}


def test_every_preset_has_a_row():
    assert sorted(VALUES) == sorted(PRESETS)


@pytest.mark.parametrize("preset", sorted(VALUES))
def test_a_preset_has_the_values_of_its_page(preset):
    config = composed(f"experiment={preset}")
    expected = VALUES[preset]
    assert {key: reading(config, key) for key in expected} == expected
