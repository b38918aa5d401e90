"""Training on the first problems alone."""

from dataclasses import replace

import pytest

from opd_lightning.errors import ConfigError
from opd_lightning.models import load_tokenizer
from opd_lightning.prompts import Prompts
from opd_lightning.task.word_problems import WordProblems

TRAIN = WordProblems().problems("train")
TOKENIZER = load_tokenizer("builtin:word_problems/student", "student.path")
POOLED = Prompts(problems=TRAIN, tokenizer=TOKENIZER, max_tokens=512, long="drop", seed=0, pool=5)


def test_each_pass_is_a_permutation_of_the_pool():
    met = [problem.index for problem in POOLED.stream(range(15)).problems]
    passes = [met[:5], met[5:10], met[10:]]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert passes[0] != passes[1]
    assert len(set(POOLED.stream(range(15)).seeds)) == 15  # a problem met again is drawn anew


def test_a_pool_counts_the_problems_that_fit():
    lengths = [len(POOLED.encode(TRAIN[i])) for i in range(20)]
    limit = sorted(lengths)[12]
    listed = [TRAIN[i] for i in range(20)]
    pooled = replace(POOLED, problems=listed, max_tokens=limit, pool=6)
    assert list(pooled.kept) == [i for i, n in enumerate(lengths) if n <= limit][:6]


def test_no_pool_and_one_larger_than_the_split_are_the_whole_split():
    listed = [TRAIN[i] for i in range(4)]
    assert len(replace(POOLED, pool=None)) == len(TRAIN)
    assert len(replace(POOLED, problems=listed, pool=9)) == 4


@pytest.mark.parametrize("pool", [0, -1, 1.5, "many", True])
def test_a_pool_of_nothing_is_refused(pool):
    with pytest.raises(ConfigError, match=r"`collector\.prompt_pool` must be a whole number of at least 1"):
        replace(POOLED, pool=pool)
