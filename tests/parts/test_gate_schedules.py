"""Gates whose thresholds move over the run."""

import math
from functools import partial

import pytest
from gated import TOKEN, applied, same, scored, written

from opd_lightning.regularizer.entropy_gate import EntropyGate
from opd_lightning.regularizer.sign_gate import SignGate
from opd_lightning.regularizer.trust_region import TrustRegion
from opd_lightning.schedule import Step

SWITCHED = {
    "sign_gate": (SignGate, {"threshold": (-1.0, 1.0)}),
    "entropy_gate": (EntropyGate, {"threshold": (10.0, -1.0)}),
    "entropy_gate's coefficient": (EntropyGate, {"threshold": -1.0, "coefficient": (0.0, 1.0)}),
    "trust_region": (
        partial(TrustRegion, outlier="mask", gate="threshold"),
        {"threshold": (-math.inf, -0.1)},
    ),
}


@pytest.mark.parametrize("name", SWITCHED)
@pytest.mark.parametrize("of", [3, 7, 150])
def test_a_gate_with_a_step_switches_on_its_step(world, name, of):
    """numerics 11.27: step k of n is done under the second value from k / n >= at on, and not a step before."""
    kind, options = SWITCHED[name]
    at = of // 3
    before, after, moving = (
        kind(**{key: choose(v) if isinstance(v, tuple) else v for key, v in options.items()})
        for choose in (
            lambda pair: pair[0],
            lambda pair: pair[1],
            lambda pair: Step(before=pair[0], after=pair[1], at=at / of),
        )
    )
    scores, experience = scored(world)
    expected = {part: written(applied(part, scores, experience)) for part in (before, after)}
    assert (expected[before] != expected[after])[world.mask].any()
    for step, part in ((0, before), (at - 1, before), (at, after), (of - 1, after)):
        loss = moving(TOKEN(scores, experience, step / of), scores, experience, step / of)
        same(written(loss), expected[part])
