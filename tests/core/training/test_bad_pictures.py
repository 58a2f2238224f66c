"""A run ends where more pictures do not decode than data.max_bad_share allows, with counts by reason."""

import numpy as np
import pytest
import torch

from jest_core.tables import SlotStatus
from jest_core.training.bad_pictures import TooManyBad
from jest_core.training.step import Learner, train_step
from tests.core.training.test_step import make_learner, super_batch, with_column
from tests.processes import run_learners

B, UNIFORM = 32, ["selection.method=uniform", "training.augmentation={}"]


def steps_with(learner: Learner, *bad: list[SlotStatus]) -> int:
    """Train on steps with these bad pictures first in their super-batches; how many steps were made."""
    batch = super_batch(learner.towers)[torch.arange(learner.run.super_batch_size)]
    for step, statuses in enumerate(bad):
        share = with_column(batch, "status", np.array([*statuses, *[0] * (len(batch) - len(statuses))]))
        n = train_step(learner, share, step).summary["n_selected"]
        assert n == (len(batch) - len(statuses) if not learner.run.selection.selects else learner.run.sub_batch_size)
    return len(bad)


DAMAGED, MISSING = SlotStatus.DAMAGED, SlotStatus.MISSING


def test_so_many_bad_pictures_as_are_allowed_are_left_out_and_one_more_ends_the_run():
    overrides = [*UNIFORM, "training.examples_trained=1600"]  # a hundredth of 50 steps of 32 pictures: 16
    assert steps_with(make_learner(overrides), [DAMAGED] * 9, [MISSING] * 7, []) == 3
    message = r"17 pictures of 2 step\(s\) do not decode \(damaged 9, missing 8\), more than data.max_bad_share 0.01 of"
    with pytest.raises(TooManyBad, match=message + " 1,600: repair the shards.*or raise data.max_bad_share"):
        steps_with(make_learner(overrides), [DAMAGED] * 9, [MISSING] * 8)


def test_a_step_without_a_picture_is_refused_whatever_the_share():
    for overrides in ([*UNIFORM, "data.max_bad_share=1"], ["data.max_bad_share=1"]):
        learner = make_learner(overrides)
        n = learner.run.super_batch_size
        with pytest.raises(TooManyBad, match=rf"none of the {n} pictures of the step decodes \(no_image {n}\)"):
            steps_with(learner, [SlotStatus.NO_IMAGE] * n)


def test_the_window_moves():
    long = "training.examples_trained=16000"  # 500 steps: of the last 100, 3.2 pictures
    learner = make_learner([*UNIFORM, long, "data.max_bad_share=0.001"])
    assert steps_with(learner, [DAMAGED] * 3) == 1
    nothing = train_step(learner, super_batch(learner.towers)[torch.arange(B)], 1).bad_rows
    for _ in range(98):
        learner.bad_pictures.add(nothing, B, learner.run)
    assert steps_with(learner, [DAMAGED] * 3) == 1


def test_selecting_runs_and_short_runs_are_bounded_too():
    for overrides in ([], UNIFORM):
        assert steps_with(make_learner(overrides), [DAMAGED] * 10) == 1  # a hundredth of 1,000
        with pytest.raises(TooManyBad, match=r"11 pictures of 1 step\(s\) .* 0.01 of 1,000"):
            steps_with(make_learner(overrides), [DAMAGED] * 11)


def half_of_one_learner(rank: int, size: int, group) -> str:
    learner = make_learner(UNIFORM, group)
    bad = np.where((np.arange(16) < 12) & (rank == 0), DAMAGED, 0)
    try:
        train_step(learner, with_column(super_batch(learner.towers)[torch.arange(16)], "status", bad), 0)
    except TooManyBad as error:
        return str(error)
    return "went on"


def test_all_learners_end_together_where_one_has_the_bad_pictures():
    messages = run_learners(half_of_one_learner, 2)
    assert messages[0] == messages[1]
    assert messages[0].startswith("12 pictures of 1 step(s) do not decode (damaged 12)")
