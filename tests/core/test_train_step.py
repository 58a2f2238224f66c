"""A step on one learner and on several gives the same picks, loss and update."""

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from jest_core import config, optim, tables, towers
from jest_core.examples import Examples
from jest_core.train_step import Learner, train_step
from tests.conftest import RUN
from tests.processes import run_learners

B = 64


def super_batch(pair: towers.Towers) -> Examples:
    """64 random pictures with captions and made-up reference embeddings."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(B):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(sink, "PNG")
        images.append(sink.getvalue())
    uids = rng.integers(0, 2**64, (B, 2), dtype=np.uint64)
    table = pa.table(
        {
            "uid_high": uids[:, 0],
            "uid_low": uids[:, 1],
            "occurrence": np.zeros(B),
            "shard": np.zeros(B),
            "row": np.arange(B),
            "image": images,
            "caption": [f"picture number {i}" for i in range(B)],
        }
    ).cast(tables.EXAMPLE)
    examples = prepare(table, pair)
    reference = torch.nn.functional.normalize(torch.randn(2, B, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    return Examples(table, examples.pixels, examples.tokens, examples.valid, *reference.half())


def prepare(table: pa.Table, pair: towers.Towers) -> Examples:
    pixels, valid = pair.view.batch(table["image"].to_pylist())
    return Examples(table, torch.from_numpy(pixels), pair.tokens(table["caption"].to_pylist()), torch.from_numpy(valid))


def make_learner(overrides: list[str], group=None) -> Learner:
    augmentation = "training.augmentation={shift_pixels: 2, colour: 0.1}"
    run = config.load(RUN.format(root=".", name="x", shards="x"), [augmentation, *overrides])
    pair = towers.create("jest-tiny", seed=0)
    if run.training.loss == "softmax":
        pair.model.logit_bias = None
    # a large eps: Adam would blow the rounding noise of gradients that are zero (key biases) up to whole steps
    optimizer = optim.adamw(pair.model, learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.1)
    wrapped = pair.model if group is None else torch.nn.parallel.DistributedDataParallel(pair.model)
    return Learner(run, pair, optimizer, wrapped, (10.0, -8.0), lambda table: prepare(table, pair), group)


def _step(rank: int, size: int, group, cuts: list[int], overrides: list[str]):
    learner = make_learner(overrides, group)
    share = super_batch(learner.towers)[torch.arange(cuts[rank], cuts[rank + 1])]
    results = [train_step(learner, share, step) for step in range(2)]
    logs = [(r.picks.to_pydict(), r.summary, r.optimisation) for r in results]
    return logs, {k: v.clone() for k, v in learner.towers.model.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "loss"), [("joint", "sigmoid"), ("independent", "sigmoid"), ("uniform", "sigmoid"), ("joint", "softmax")]
)
@pytest.mark.parametrize("cuts", [[0, 32, 64], [0, 10, 20, 44, 64]])
def test_several_learners_do_what_one_does(method: str, loss: str, cuts: list[int]):
    overrides = [f"selection.method={method}", f"selection.loss={loss}", f"training.loss={loss}"]
    (alone, weights), *_ = [_step(0, 1, None, [0, B], overrides)]
    for logs, state in run_learners(_step, len(cuts) - 1, cuts, overrides):
        for (picks, summary, optimisation), (picks_1, summary_1, optimisation_1) in zip(logs, alone, strict=True):
            assert picks["uid"] == picks_1["uid"]
            assert picks["selected"] == picks_1["selected"]
            assert summary == pytest.approx(summary_1, rel=1e-4, nan_ok=True)
            assert optimisation == pytest.approx(optimisation_1, rel=1e-3)
        for name, value in state.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=2e-5)


def test_the_criterion_decides_what_is_needed():
    hard = make_learner(["selection.criterion=hard"])
    batch = super_batch(hard.towers)
    without = Examples(batch.rows, batch.pixels, batch.tokens, batch.valid)
    picks = train_step(hard, without, 0).picks
    assert np.isnan(picks["reference_loss"].to_numpy()).all()
    assert np.isfinite(picks["learner_loss"].to_numpy()).all()


def test_bad_slots_are_never_trained_on():
    for method in ("joint", "uniform"):
        learner = make_learner([f"selection.method={method}"])
        batch = super_batch(learner.towers)
        valid = torch.arange(B) % 3 != 0
        masked = Examples(batch.rows, batch.pixels, batch.tokens, valid, batch.reference_image, batch.reference_text)
        result = train_step(learner, masked, 0)
        assert all(position % 3 for position in result.picks["position"].to_pylist())
        assert result.summary["n_bad"] == (~valid).sum()


def test_training_lowers_the_loss():
    learner = make_learner(["selection.method=uniform", "training.warmup_steps=0", "training.augmentation={}"])
    batch = super_batch(learner.towers)
    losses = [train_step(learner, batch, step).optimisation["loss"] for step in range(5)]
    assert losses[-1] < losses[0]
