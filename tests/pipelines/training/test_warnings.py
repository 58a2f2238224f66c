"""What `jest train` says before the first step of a run that would end other than meant."""

import re

import pytest

from pipelines.training import train


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.warmup_steps=1000"], "training.warmup_steps 1000 is more than the 6 steps of the run.*0.006"),
        (["training.warmup_steps=7", "training.schedule=constant"], "warmup_steps 7 is more than the 6 steps.*0.86"),
        (["training.warmup_steps=7", "training.schedule=rsqrt"], "warmup_steps 7"),
        (["training.warmup_steps=6"], None),
        (["training.warmup_steps=0"], None),
    ],
)
def test_a_warmup_that_is_longer_than_the_run_is_said(make_run, overrides, said):
    warning = train._unfinished_warmup(make_run("x", *overrides))
    assert re.search(said, warning or "") if said else warning is None
