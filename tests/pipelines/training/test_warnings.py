"""What `jest train` says before a run that would end other than meant, and what it does not count as trained."""

import json
import re

import numpy as np
import pytest
import torch

from jest_core.training.step import train_step
from pipelines.training import doubtful
from pipelines.training.heartbeat import Board
from pipelines.training.metrics import Journal
from tests.core.training.test_step import make_learner, super_batch, with_column


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
    warning = doubtful.unfinished_warmup(make_run("x", *overrides))
    assert re.search(said, warning or "") if said else warning is None


def test_pictures_that_do_not_decode_are_not_counted_as_trained(make_run):
    run = make_run("x", "selection.method=uniform", "data.max_bad_share=1")
    learner = make_learner(["selection.method=uniform", "data.max_bad_share=1"])
    batch = super_batch(learner.towers)[torch.arange(32)]
    bad = with_column(batch, "status", np.where(np.arange(32) < 7, 4, 0))
    with Journal(run, Board(in_process=True), {"step": 0, "seconds": 0.0, "log_parts": []}) as journal:
        for step, share in enumerate([batch, bad, batch]):
            journal.add(train_step(learner, share, step), step + 1, {"wait": 0.0, "batch": 2.0})
    lines = [json.loads(line) for line in journal.text().splitlines()]
    assert [line["jest/samples_trained"] for line in lines] == [32, 57, 89]
    assert [line["jest/samples_seen"] for line in lines] == [32, 64, 96]
    assert [line["train/samples_per_second"] for line in lines] == [16, 12.5, 16]


@pytest.mark.parametrize(
    ("n_streams", "n_learners", "times"), [(4, 8, "2"), (6, 4, "1.33"), (8, 8, None), (8, 2, None)]
)
def test_streams_that_several_learners_read_are_named(make_run, n_streams, n_learners, times):
    sizes = [f"data.n_streams={n_streams}", "training.sub_batch_size=48", "training.examples_trained=48"]
    warning = doubtful.repeated_reading(
        make_run("uniform", "selection.method=uniform", *sizes, f"training.n_learners={n_learners}")
    )
    assert (warning is None) == (times is None)
    assert warning is None or f"{times} times as many pictures" in warning
