"""A training step on one learner and on several gives the same picks, loss and update."""

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from jest_core import run_file, tables
from jest_core.examples.preprocess import resize
from jest_core.examples.super_batch import Examples
from jest_core.models import sharding, towers
from jest_core.training import optim
from jest_core.training.forward import TrainingPass, replicated
from jest_core.training.step import Learner, train_step
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
            "content": np.arange(B),
            "status": np.zeros(B),
        }
    ).cast(tables.EXAMPLE)
    examples = prepare(table, pair)
    reference = torch.nn.functional.normalize(torch.randn(2, B, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    return Examples(table, examples.pixels, examples.tokens, *reference.half())


def prepare(table: pa.Table, pair: towers.Towers) -> Examples:
    pixels, _ = pair.view.batch(table["image"].to_pylist())
    return Examples(table, torch.from_numpy(pixels), pair.tokens(table["caption"].to_pylist()))


def make_learner(overrides: list[str], group=None, name: str = "jest-tiny") -> Learner:
    augmentation = "training.augmentation={shift_pixels: 2, colour: 0.1}"
    run = run_file.load(RUN.format(root=".", name="x", shards="x"), [augmentation, *overrides])
    pair = towers.create(name, seed=0)
    if run.training.loss == "softmax":
        pair.model.logit_bias = None
    if run.training.activation_checkpointing:
        pair.checkpoint_activations()
    if run.training.shard_weights and group is not None:
        pair.shard(group)
    # a large eps, as Adam would scale the rounding noise of zero gradients (key biases) up to full steps
    optimizer = optim.adamw(pair.model, learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.1)
    trained = TrainingPass(pair, run, group)
    alone = group is None or pair.sharded
    return Learner(
        run,
        pair,
        (10.0, -8.0),
        lambda table: prepare(table, pair),
        group,
        optimizer=optimizer,
        wrapped=trained if alone else replicated(trained),
    )


def two_steps(rank: int, size: int, group, cuts: list[int], overrides: list[str]):
    """Logs of two steps on rows cuts[rank] .. cuts[rank + 1] of the super-batch, and the weights afterwards."""
    learner = make_learner(overrides, group)
    share = super_batch(learner.towers)[torch.arange(cuts[rank], cuts[rank + 1])]
    results = [train_step(learner, share, step) for step in range(2)]
    logs = [(r.picks.to_pydict(), r.summary, r.optimisation | r.agreement) for r in results]
    return logs, {k: sharding.whole(v).clone() for k, v in learner.towers.model.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "loss"), [("joint", "sigmoid"), ("independent", "sigmoid"), ("uniform", "sigmoid"), ("joint", "softmax")]
)
@pytest.mark.parametrize("cuts", [[0, 32, 64], [0, 10, 20, 44, 64]])
def test_several_learners_match_a_single_learner(method: str, loss: str, cuts: list[int]):
    compare(cuts, [f"selection.method={method}", f"selection.loss={loss}", f"training.loss={loss}"])


@pytest.mark.parametrize("method", ["joint", "uniform"])
@pytest.mark.parametrize("cuts", [[0, 32, 64], [0, 10, 20, 44, 64]])
def test_several_learners_match_a_single_learner_at_two_resolutions(method: str, cuts: list[int]):
    flexi = ["selection.score_patch_size=16", "training.low_resolution={patch_size: 16, share: 0.25}"]
    more = ["training.micro_batch_size=3", "selection.agreement_every_steps=2"]
    compare(cuts, [f"selection.method={method}", *flexi, *more])


def first_half_bad(rank: int, size: int, group, more: list[str]):
    """Loss and number of trained examples of a step whose first 32 slots are bad, all those of learner 0 of two."""
    learner = make_learner(
        ["selection.method=uniform", "training.micro_batch_size=8", "data.max_bad_share=1", *more], group
    )
    batch = with_column(super_batch(learner.towers), "status", np.where(np.arange(B) < 32, 4, 0))
    result = train_step(learner, batch[torch.arange(rank * B // size, (rank + 1) * B // size)], 0)
    return result.optimisation["loss"], result.summary["n_selected"]


@pytest.mark.parametrize("more", [[], ["training.low_resolution={patch_size: 16}"]])
def test_a_learner_without_valid_slots_keeps_training_with_the_others(more: list[str]):
    alone = first_half_bad(0, 1, None, more)
    for result in run_learners(first_half_bad, 2, more):
        assert result == pytest.approx(alone, rel=1e-4)
    assert alone[1] == 32


def compare(cuts: list[int], overrides: list[str]) -> None:
    """Assert that learners with these shares of the super-batch log and train as one learner does."""
    (alone, weights), *_ = [two_steps(0, 1, None, [0, B], overrides)]
    for logs, state in run_learners(two_steps, len(cuts) - 1, cuts, overrides):
        for (picks, summary, optimisation), (picks_1, summary_1, optimisation_1) in zip(logs, alone, strict=True):
            assert picks["uid"] == picks_1["uid"]
            assert picks["selected"] == picks_1["selected"]
            assert summary == pytest.approx(summary_1, rel=1e-4, nan_ok=True)
            assert optimisation == pytest.approx(optimisation_1, rel=1e-3)
        for name, value in state.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=2e-5)


def with_column(batch: Examples, name: str, values: np.ndarray) -> Examples:
    field = tables.EXAMPLE.field(name)
    column = pa.array(values).cast(field.type)
    rows = batch.rows.set_column(batch.rows.schema.get_field_index(name), field, column)
    return dataclasses.replace(batch, rows=rows)


def _masked(rank: int, size: int, group, by: str):
    learner = make_learner([f"data.mask_duplicates={by}", "selection.filter_ratio=0.8"], group)
    batch = super_batch(learner.towers)
    same = {"uid_high": np.arange(B) % 40, "uid_low": np.zeros(B), "content": np.arange(B) % 48}
    for name in ("uid_high", "uid_low") if by == "uid" else ("content",):
        batch = with_column(batch, name, same[name])
    # other slots do not count as duplicates of a bad one
    batch = with_column(batch, "status", np.where(np.arange(B) == 0, 4, 0))
    share = batch[torch.arange(rank * B // size, (rank + 1) * B // size)]
    result = train_step(learner, share, 0)
    return result.picks.to_pydict(), result.summary


@pytest.mark.parametrize(("by", "n"), [("uid", 40), ("image", 48)])
def test_only_one_of_duplicate_slots_is_selectable_across_learners(by: str, n: int):
    picks, summary = _masked(0, 1, None, by)
    assert summary["n_bad"] == 1
    selected = [p for p, chosen in zip(picks["position"], picks["selected"], strict=True) if chosen]
    if by == "image":
        assert summary["n_duplicates"] == B - n - 1  # slot 48 replaces slot 0, which is bad
        assert max(selected) <= n
    assert summary["n_offered"] + summary["n_duplicates"] + summary["n_bad"] == B
    names = picks["uid"] if by == "uid" else [p % n for p in picks["position"]]
    assert len(set(names)) == len(names)
    for picks_2, summary_2 in run_learners(_masked, 2, by):
        assert picks_2["position"] == picks["position"]
        assert summary_2["n_duplicates"] == summary["n_duplicates"]


@pytest.mark.parametrize("low", [[], ["training.low_resolution={image_size: 32}"]])
def test_late_decoding_trains_on_whole_pictures_and_scores_reduced_ones(low: list[str]):
    """Equal, up to the decoder's rounding, to eager decoding that reduces the same pictures on the device.

    Examples that are trained at the resolution of scoring are not decoded again.
    """
    more = ["selection.score_image_size=32", "training.augmentation={}", *low]
    eager, late = (make_learner([f"data.decode={mode}", *more], name="jest-drawings") for mode in ("eager", "late"))
    whole = super_batch(eager.towers)
    reduced = dataclasses.replace(whole, pixels=resize(whole.pixels, 32).round().to(torch.uint8))
    decoded: list[int] = []

    def prepare_again(rows: pa.Table) -> Examples:
        decoded.append(len(rows))
        return prepare(rows, late.towers)

    late.prepare, late.prepare_small = prepare_again, lambda rows: pytest.fail("one learner receives nothing")
    one, two = train_step(eager, whole, 0), train_step(late, reduced, 0)
    assert decoded == [16 if low else 32]
    same = set(one.picks["position"].to_pylist()[: B // 2]) & set(two.picks["position"].to_pylist()[: B // 2])
    assert len(same) >= 0.9 * B // 2
    assert one.optimisation["loss"] == pytest.approx(two.optimisation["loss"], rel=0.02)


def test_training_lowers_the_loss():
    learner = make_learner(["selection.method=uniform", "training.warmup_steps=0", "training.augmentation={}"])
    batch = super_batch(learner.towers)
    losses = [train_step(learner, batch, step).optimisation["loss"] for step in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("own_view", [False, True])
def test_an_online_reference_selects_like_its_score_cache(own_view: bool):
    learner = make_learner([])
    reference = towers.create("jest-tiny", seed=3)
    batch = super_batch(learner.towers)
    embeddings = reference.embed(batch.pixels, batch.tokens, batch_size=16)
    cached = dataclasses.replace(batch, reference_image=embeddings.image.half(), reference_text=embeddings.text.half())
    from_cache = train_step(learner, cached, 0).picks
    online = dataclasses.replace(make_learner([]), reference=reference)
    if own_view:
        online.prepare_reference = lambda table: prepare(table, reference)
    without = dataclasses.replace(batch, reference_image=None, reference_text=None)
    result = train_step(online, without, 0)
    selected = [set(np.array(p["uid"])[p["selected"].to_numpy()]) for p in (from_cache, result.picks)]
    assert len(selected[0] & selected[1]) >= 0.9 * len(selected[0])  # embeddings are rounded to float16
    assert result.seconds["reference"] > 0


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_the_scale_is_bounded_for_the_softmax_loss_alone(loss: str):
    learner = make_learner([f"training.loss={loss}", f"selection.loss={loss}"])
    with torch.no_grad():
        learner.towers.model.logit_scale.fill_(5.0)
    result = train_step(learner, super_batch(learner.towers), 0)
    assert (result.optimisation["logit_scale"] <= 100.001) == (loss == "softmax")
