"""Runs that diverge: they stop, name the examples, and keep the last sound checkpoint."""

import pyarrow.parquet as pq
import pytest

from pipelines.base import checkpoints, storage
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from pipelines.training import loop, train
from pipelines.training.heartbeat import Board, Order
from tests.pipelines.training.test_train import other_dir


@pytest.fixture
def prepared(make_scored_run):
    return make_scored_run("joint")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "why", "in_process"),
    [
        (["selection.method=uniform", "training.learning_rate=1e30"], "loss nan", True),
        (["training.learning_rate=1e30"], "examples have NaN or infinite embeddings", True),
        (["training.max_loss=1", "training.max_failures=1"], "is above training.max_loss 1;", False),
    ],
)
def test_a_run_that_diverges_stops_and_names_the_examples(prepared, more: list[str], why: str, in_process: bool):
    run = other_dir(prepared, "diverged", "training.checkpoint_every_steps=1", *more)
    with pytest.raises(ValueError, match=why) as raised:
        train.run_stage(run, in_process=in_process)
    directory = run.path("diverged")
    (name,) = storage.names(f"{directory}/failed")
    step = int(name.split("-")[1])
    assert f"step {step}: " in str(raised.value)
    assert checkpoints.steps(directory) == list(range(1, step + 1))  # no checkpoint includes the failed step
    led_to_it = f"the checkpoint after step {step} has the weights that led to it"
    assert (led_to_it in str(raised.value)) == (step > 0)
    saved = pq.read_table(f"{directory}/failed/{name}")
    batches = super_batches.stream(run, open_source(run), 32, rank=0, n_learners=1, first_step=step)
    assert saved["uid"].to_pylist() == next(batches).identities()["uid"].to_pylist()


@pytest.mark.slow
def test_a_diverged_step_never_replaces_the_last_sound_checkpoint(prepared):
    """Weights that a step has made turn out to be unsound at the next step, when their checkpoint is there already."""
    settings = ["selection.method=uniform", "training.checkpoint_every_steps=1", "training.keep_last_checkpoints=1"]
    sound = other_dir(prepared, "sound", *settings, "training.examples_trained=96")
    train.run_stage(sound, in_process=True)
    assert checkpoints.steps(sound.path("sound")) == [3]  # at the end no more are kept than asked for
    too_fast = ["training.learning_rate=10", "training.warmup_steps=100", "training.max_loss=12"]
    run = other_dir(prepared, "diverged", *settings, *too_fast)
    with pytest.raises(ValueError, match=r"loss \S+ is above training\.max_loss 12;.* has the weights that led to it"):
        train.run_stage(run, in_process=True)
    *sound_before, led_to_it = checkpoints.steps(run.path("diverged"))
    assert sound_before == [led_to_it - 1]


@pytest.mark.slow
@pytest.mark.parametrize(("order", "reached"), [(Order.restart, [1]), (Order.restart_at_checkpoint, [3])])
def test_learners_that_are_to_start_again_end_with_a_checkpoint(prepared, order: Order, reached: list[int]):
    run, board = other_dir(prepared, "ordered", "training.checkpoint_every_steps=3"), Board(in_process=True)
    board.order(order)
    loop.learn(run, board)
    assert checkpoints.steps(run.path("ordered")) == reached
