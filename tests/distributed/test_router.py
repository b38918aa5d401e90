"""``teacher=router`` by two processes, one of which may have no row of a teacher: equal metrics to one process."""

from __future__ import annotations

import pytest

from distributed.test_two_processes import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROUTER = [
    "teacher=router",
    *(f"+teacher.teachers.{name}=builtin:word_problems/{name}" for name in ("student", "teacher")),
    "teacher.routes={3 steps: student, 6 steps: teacher}",
    "trainer.max_steps=2",
    "trainer.accumulate_grad_batches=1",
    "collector.prompts_per_collection=4",
    "rollout.max_new_tokens=40",
    "evaluation.settings.samples=0",
    "evaluation.teacher=false",
]


def test_two_processes_sum_the_same_table(tmp_path):
    one = train(tmp_path / "one", *ROUTER)
    two = train(tmp_path / "two", *ROUTER, "trainer.devices=2", "strategy=ddp")
    assert one.code == two.code == 0, one.err + two.err
    assert one.rows.keys() == two.rows.keys()
    for step, row in one.rows.items():
        assert two.rows[step].keys() == row.keys()
        for name, value in row.items():
            if not name.startswith("throughput/"):
                assert two.rows[step][name] == pytest.approx(value, rel=1e-4, abs=2e-5), (step, name)
    shares = [row[f"teacher/{n}/share"] for row in one.rows.values() for n in ("student", "teacher", "default")
              if f"teacher/{n}/share" in row]  # fmt: skip
    assert sum(shares[:3]) == pytest.approx(1.0)
    assert len([share for share in shares[:3] if share > 0]) >= 2
