"""A served teacher that is gone in the middle of a run, in this process: what is said, kept and gone on with."""

from __future__ import annotations

import pytest
from serving.servers import a_bench, serving

from commands.running import here
from commands.test_serving import SMALL, run


@pytest.mark.parametrize(("answers", "steps"), [(1, 0), (2, 2)], ids=["first", "second"])
def test_a_server_gone_in_any_collection_is_a_sentence_and_costs_nothing(tmp_path, answers, steps):
    """Before the first optimizer step there is nothing to keep; after one a checkpoint, and the run goes on."""
    with serving(a_bench(context=1024, most_ids=64, most_bytes=2**24)) as (address, service):
        served = ["callbacks=[checkpoint]", "support=student", "teacher=served", f"teacher.address={address}"]
        score, limit, left = service.batches.score, service.room.limit, [answers]

        def a_few(requests):
            left[0] -= 1  # the first is the check at the start, and then each collection's
            service.room.limit = limit if left[0] else 0
            return score(requests)

        service.batches.score = a_few
        folder = tmp_path / "run"
        done = here("train", *SMALL, *served, "teacher.patience_s=1", folder=folder)
        assert done.code == 2
        last = done.err.strip().splitlines()[-1]
        assert f"`teacher.address` must name a server that answers, got none from {address} for 1 s" in last
        assert "Traceback" not in done.err
        kept = [path.name for path in folder.rglob("*.ckpt")]
        assert kept == ([f"step={steps}.ckpt"] if steps else [])
        service.batches.score, service.room.limit = score, limit
        if steps:
            whole = run(tmp_path / "whole", *served)
            again = here("train", *SMALL, *served, f"resume={folder}", folder=folder)
            assert again.code == 0, again.err
            assert again.losses == whole.losses
            assert len(whole.losses) == 4
