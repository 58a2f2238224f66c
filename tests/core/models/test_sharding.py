"""Sharded weights give the same results as unsharded ones, and each learner stores only its shard."""

import pytest
import torch

from jest_core.models import sharding
from jest_core.training.step import train_step
from pipelines.base import checkpoints
from tests.core.training.test_step import B, compare, first_half_bad, make_learner, super_batch, two_steps
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
    ids=["softmax on four", "two resolutions", "activation checkpointing"],
)
def test_sharded_learners_match_a_single_learner(cuts: list[int], more: list[str]):
    compare(cuts, [SHARDED, *more])


def test_bf16_results_match_those_with_unsharded_weights():
    bf16 = ["selection.score_precision=bf16", "training.precision=bf16"]
    (sharded, _), (whole, _) = (run_learners(two_steps, 2, [0, 32, 64], [*bf16, *more])[0] for more in ([SHARDED], []))
    for (picks, _, optimisation), (picks_1, _, optimisation_1) in zip(sharded, whole, strict=True):
        assert picks["uid"] == picks_1["uid"]
        assert optimisation == pytest.approx(optimisation_1, rel=1e-3)


@pytest.mark.parametrize("more", [[], TWO_RESOLUTIONS])
def test_a_learner_without_valid_slots_runs_as_many_passes_as_the_others(more: list[str]):
    alone = first_half_bad(0, 1, None, more)
    for result in run_learners(first_half_bad, 2, [SHARDED, *more]):
        assert result == pytest.approx(alone, rel=1e-4)


def _shares(rank: int, size: int, group):
    """Numbers of weights, gradients and moments that this learner stores after a step; and of all weights."""
    learner = make_learner([SHARDED], group)
    model = learner.towers.model
    train_step(learner, super_batch(learner.towers)[torch.arange(rank * B // size, (rank + 1) * B // size)], 0)
    moments = [state["exp_avg"] for state in learner.optimizer.state.values()]
    stored = [
        sum(_local(x) for x in kind) for kind in (model.parameters(), [p.grad for p in model.parameters()], moments)
    ]
    return stored, sum(p.numel() for p in model.parameters())


def _local(x: torch.Tensor) -> int:
    return x.to_local().numel() if isinstance(x, sharding.DTensor) else x.numel()


@pytest.mark.parametrize("size", [2, 4])
def test_weights_gradients_and_moments_are_split_evenly_over_learners(size: int):
    results = run_learners(_shares, size)
    for stored, n in results:
        assert all(n / size * 0.9 < x < n / size * 1.1 for x in stored), (stored, n)
    for kind in range(3):
        total = sum(stored[kind] for stored, _ in results)
        assert total == pytest.approx(results[0][1], abs=2 * size)  # two scalars are not sharded


def _resume_and_step(rank: int, size: int, group, directory: str, steps: range, overrides: list[str]):
    """Resume from the checkpoint, train some steps, and write the next checkpoint; the losses."""
    learner = make_learner(overrides, group)
    checkpoints.resume(directory, learner.towers, learner.optimizer)
    share = super_batch(learner.towers)[torch.arange(rank * B // size, (rank + 1) * B // size)]
    losses = [train_step(learner, share, step).optimisation["loss"] for step in steps]
    content = checkpoints.copied(checkpoints.content(steps.stop, learner.towers, learner.optimizer), keep=rank == 0)
    if rank == 0:
        checkpoints.write(directory, steps.stop, content | {"jest": {"step": steps.stop}})
    return losses


def test_checkpoints_are_interchangeable_between_sharded_and_unsharded_learners(tmp_path):
    single, changing = f"{tmp_path}/single", f"{tmp_path}/changing"  # one learner; another number in each part
    (losses,) = run_learners(_resume_and_step, 1, single, range(5), [])
    changing_losses = run_learners(_resume_and_step, 2, changing, range(2), [SHARDED])[0]
    changing_losses += run_learners(_resume_and_step, 4, changing, range(2, 3), [SHARDED])[0]
    changing_losses += run_learners(_resume_and_step, 2, changing, range(3, 4), [])[0]
    changing_losses += run_learners(_resume_and_step, 2, changing, range(4, 5), [SHARDED])[0]
    assert changing_losses == pytest.approx(losses, rel=1e-4)
    one, other = checkpoints.read(single), checkpoints.read(changing)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-3, atol=5e-5)
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(other["optimizer"]["state"][number][name], value, rtol=1e-2, atol=1e-4)
