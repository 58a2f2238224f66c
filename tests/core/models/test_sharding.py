"""Sharded weights compute what whole ones do, and each learner holds its share."""

import pytest
import torch

from jest_core.models import sharding
from jest_core.training.step import train_step
from pipelines.base import checkpoints
from tests.core.training.test_step import B, compare, make_learner, nothing_sound, super_batch, two_steps
from tests.processes import run_learners

SHARDED = "training.shard_weights=true"
TWO_RESOLUTIONS = ["training.low_resolution={patch_size: 16}"]
ACTIVATIONS = ["training.activation_checkpointing=true"]


@pytest.mark.parametrize(
    ("cuts", "more"),
    [
        ([0, 10, 20, 44, 64], ["selection.method=joint", "training.loss=softmax", "selection.loss=softmax"]),
        ([0, 32, 64], ["selection.method=uniform", "training.micro_batch_size=9", *TWO_RESOLUTIONS]),
        ([0, 32, 64], ["selection.method=joint", "training.micro_batch_size=5", *ACTIVATIONS]),
    ],
    ids=["softmax on four", "two resolutions", "activations made again"],
)
def test_sharded_learners_do_what_one_does(cuts: list[int], more: list[str]):
    compare(cuts, [SHARDED, *more])


def test_bf16_is_that_of_learners_with_whole_weights():
    bf16 = ["selection.score_precision=bf16", "training.precision=bf16"]
    (sharded, _), (whole, _) = (run_learners(two_steps, 2, [0, 32, 64], [*bf16, *more])[0] for more in ([SHARDED], []))
    for (picks, _, optimisation), (picks_1, _, optimisation_1) in zip(sharded, whole, strict=True):
        assert picks["uid"] == picks_1["uid"]
        assert optimisation == pytest.approx(optimisation_1, rel=1e-3)


@pytest.mark.parametrize("more", [[], TWO_RESOLUTIONS])
def test_a_learner_without_a_sound_slot_makes_as_many_passes(more: list[str]):
    alone = nothing_sound(0, 1, None, more)
    for found in run_learners(nothing_sound, 2, [SHARDED, *more]):
        assert found == pytest.approx(alone, rel=1e-4)


def _shares(rank: int, size: int, group):
    """How much a learner holds after a step."""
    learner = make_learner([SHARDED], group)
    model = learner.towers.model
    train_step(learner, super_batch(learner.towers)[torch.arange(rank * B // size, (rank + 1) * B // size)], 0)
    moments = [state["exp_avg"] for state in learner.optimizer.state.values()]
    held = [
        sum(_local(x) for x in kind) for kind in (model.parameters(), [p.grad for p in model.parameters()], moments)
    ]
    return held, sum(p.numel() for p in model.parameters())


def _local(x: torch.Tensor) -> int:
    return x.to_local().numel() if isinstance(x, sharding.DTensor) else x.numel()


@pytest.mark.parametrize("size", [2, 4])
def test_weights_gradients_and_moments_are_shared_out(size: int):
    found = run_learners(_shares, size)
    for held, n in found:
        assert all(n / size * 0.9 < h < n / size * 1.1 for h in held), (held, n)
    for kind in range(3):
        assert sum(held[kind] for held, _ in found) == pytest.approx(found[0][1], abs=2 * size)  # two scalars are whole


def _content(rank: int, size: int, group, directory: str, steps: range, overrides: list[str]):
    """Take up a checkpoint, make some steps, and write the next one."""
    learner = make_learner(overrides, group)
    checkpoints.resume(directory, learner.towers, learner.optimizer)
    share = super_batch(learner.towers)[torch.arange(rank * B // size, (rank + 1) * B // size)]
    losses = [train_step(learner, share, step).optimisation["loss"] for step in steps]
    held = checkpoints.copied(checkpoints.content(steps.stop, learner.towers, learner.optimizer), keep=rank == 0)
    if rank == 0:
        checkpoints.write(directory, steps.stop, held | {"jest": {"step": steps.stop}})
    return losses


def test_a_checkpoint_is_whole_whoever_writes_it_and_whoever_takes_it_up(tmp_path):
    quiet, changing = f"{tmp_path}/quiet", f"{tmp_path}/changing"
    (losses,) = run_learners(_content, 1, quiet, range(5), [])
    found = run_learners(_content, 2, changing, range(2), [SHARDED])[0]
    found += run_learners(_content, 4, changing, range(2, 3), [SHARDED])[0]
    found += run_learners(_content, 2, changing, range(3, 4), [])[0]
    found += run_learners(_content, 2, changing, range(4, 5), [SHARDED])[0]
    assert found == pytest.approx(losses, rel=1e-4)
    one, other = checkpoints.read(quiet), checkpoints.read(changing)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-3, atol=5e-5)
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(other["optimizer"]["state"][number][name], value, rtol=1e-2, atol=1e-4)
