"""The log of a step: bad slots, and as many refused examples as training.n_refused_logged."""

import numpy as np
import pytest

from jest_core.training.step import train_step
from tests.core.training.test_step import B, make_learner, super_batch, with_column


def test_bad_slots_are_never_trained_on_and_are_logged():
    for method in ("joint", "uniform"):
        learner = make_learner([f"selection.method={method}", "data.max_bad_share=1"])
        bad = np.arange(B) % 3 == 0
        masked = with_column(super_batch(learner.towers), "status", np.where(bad, 4, 0))
        result = train_step(learner, masked, 7)
        assert all(position % 3 for position in result.picks["position"].to_pylist())
        assert result.summary["n_bad"] == bad.sum()
        assert result.bad_rows["row"].to_pylist() == np.flatnonzero(bad).tolist()
        assert set(result.bad_rows["reason"].to_pylist()) == {"damaged"}
        assert set(result.bad_rows["step"].to_pylist()) == {7}


@pytest.mark.parametrize("override", ["training.n_refused_logged=0", "training.n_refused_logged=1000"])
def test_any_number_of_refused_examples_is_logged(override: str):
    learner = make_learner([override, "data.max_bad_share=1"])
    batch = with_column(super_batch(learner.towers), "status", np.where(np.arange(B) % 2, 0, 4))
    assert len(train_step(learner, batch, 0).picks) == 32  # all valid examples are selected
    refused = train_step(learner, super_batch(learner.towers), 0).picks["selected"].to_pylist().count(False)
    assert refused == (0 if override.endswith("=0") else 32)
