"""Drawing a sub-batch needs no optimiser. tests/core/training/test_step.py draws with several learners."""

import numpy as np
import torch

from jest_core.examples.super_batch import Examples
from jest_core.training.draw import Selector, draw
from tests.core.training.test_step import make_learner, super_batch


def test_a_selector_draws_like_a_learner_and_changes_no_weights():
    learner = make_learner([])
    fields = {name: value for name, value in vars(learner).items() if name not in ("optimizer", "wrapped")}
    batch = super_batch(learner.towers)
    before = [p.clone() for p in learner.towers.model.parameters()]
    drawn = draw(Selector(**fields), batch, 3)
    (group,) = drawn.groups
    log = drawn.log.picks.filter(drawn.log.picks["selected"])
    assert sorted(group.examples.identities()["uid"].to_pylist()) == sorted(log["uid"].to_pylist())
    assert log["uid"].to_pylist() == draw(learner, batch, 3).log.picks["uid"].to_pylist()[: len(log)]
    assert log["uid"].to_pylist() != draw(learner, batch, 4).log.picks["uid"].to_pylist()[: len(log)]
    assert all(torch.equal(a, b) for a, b in zip(before, learner.towers.model.parameters(), strict=True))
    assert set(drawn.seconds) == {"score", "reference", "select", "log", "exchange"}


def test_uniform_selection_trains_on_the_whole_super_batch():
    learner = make_learner(["selection.method=uniform"])
    batch = super_batch(learner.towers)
    drawn = draw(learner, batch, 0)
    assert [len(group.examples) for group in drawn.groups] == [len(batch)]
    assert drawn.seconds == {}


def test_the_criterion_decides_which_losses_are_computed():
    hard = make_learner(["selection.criterion=hard"])
    batch = super_batch(hard.towers)
    without = Examples(batch.rows, batch.pixels, batch.tokens)
    picks = draw(hard, without, 0).log.picks
    assert np.isnan(picks["reference_loss"].to_numpy()).all()
    assert np.isfinite(picks["learner_loss"].to_numpy()).all()
    easy = make_learner(["selection.criterion=easy"])
    log = draw(easy, batch, 0).log
    assert np.isnan(log.picks["learner_loss"].to_numpy()).all()
    assert np.isfinite(log.picks["reference_loss"].to_numpy()).all()
    assert log.summary["sub_batch_matched_score"] > log.summary["super_batch_matched_score"]
