"""A run file that a directory was not begun with: what goes on, what is refused, and with which remedy."""

import pytest

from jest_core import run_file
from pipelines.base import checkpoints, storage
from pipelines.training import run_directory, train
from tests.commands import same_log_and_weights

CONSTANT = ["training.schedule=constant", "training.warmup_steps=2"]


@pytest.fixture
def begun(make_run):
    """begun(step, "training.schedule=constant", ...): a run whose newest checkpoint is that one; its contents are not
    looked at."""

    def make(step: int, *overrides: str):
        run = make_run("begun", *overrides)
        run_directory.claim(run)
        storage.write_bytes(checkpoints.path_of(run.path("begun"), step), b"")
        return lambda *more: run_file.load(run_file.dump(run), list(more))

    return make


@pytest.mark.slow
def test_a_run_that_is_made_longer_is_the_one_that_was_longer_from_the_start(make_scored_run):
    longer = make_scored_run("longer", *CONSTANT)
    train.run_stage(longer, in_process=True)
    short = make_scored_run("short", *CONSTANT, "training.examples_trained=96")
    assert train.run_stage(short, in_process=True)["steps"] == 3
    extended = run_file.load(run_file.dump(short), ["training.examples_trained=192"])
    assert train.run_stage(extended, in_process=True)["steps"] == 6
    same_log_and_weights(extended, longer)
    with pytest.raises(ValueError, match="remove the checkpoints after that step"):
        train.run_stage(short, in_process=True)


def test_circumstances_may_change(begun):
    changed = begun(2)("training.n_learners=2", "reference.n_actors=7", "data.max_bad_share=0.5")
    assert run_directory.claim(changed) is None


def test_another_learning_rate_is_another_run(begun):
    with pytest.raises(ValueError, match=r"training\.learning_rate: there 0\.001, here 0\.002"):
        run_directory.claim(begun(2)("training.learning_rate=0.002", "training.examples_trained=384"))


def test_a_cosine_cannot_be_made_longer(begun):
    with pytest.raises(ValueError, match=r"6 steps, and this run file has 12: with training\.schedule cosine"):
        run_directory.claim(begun(2)("training.examples_trained=384"))


@pytest.mark.parametrize(
    ("step", "more", "until"),
    [
        (4, ["training.examples_trained=384"], None),  # the cool-down of 2 begins after step 4 of 6
        (5, ["training.examples_trained=384"], 4),
        (4, ["training.cooldown_steps=1"], None),
        (4, ["training.cooldown_steps=4"], 2),
        (2, ["training.examples_trained=128"], None),  # ends earlier: its cool-down begins now
        (4, ["training.examples_trained=128"], 2),
    ],
)
def test_a_budget_may_change_before_the_cool_down(begun, step: int, more: list[str], until: int | None):
    run = begun(step, *CONSTANT, "training.cooldown_steps=2")(*more)
    if until is None:
        assert run_directory.claim(run) is None
        assert storage.manifest(run.path("begun"))["config"] == run_file.identity(run)
    else:
        with pytest.raises(ValueError, match=f"the same up to step {until} only"):
            run_directory.claim(run)


def test_asking_writes_nothing(begun):
    run = begun(2, *CONSTANT)
    before = storage.manifest(run().path("begun"))
    run_directory.refuse_other(run("training.examples_trained=384"))
    assert storage.manifest(run().path("begun")) == before
