"""What runs on a submission, and what does not."""

from pathlib import Path


def test_the_run_of_a_submission_says_last_that_it_left_vllm_out():
    lines = (Path(__file__).parents[2] / ".ci" / "run").read_text().splitlines()
    assert lines[-1].startswith('echo "not run here: make test-vllm')
    assert not [line for line in lines if line.startswith("make test-vllm")]
