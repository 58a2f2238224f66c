"""Resuming in a run directory with a changed run file: which changes are accepted, and which refused."""

import pytest

from jest_core import run_file
from jest_core.training.step import train_step
from pipelines.base import checkpoints, manifests, storage
from pipelines.evaluation import results
from pipelines.training import loop, metrics_line, run_directory, selection_log, train
from tests.commands import assert_same_log_and_weights

CONSTANT = ["training.schedule=constant", "training.warmup_steps=2"]


@pytest.fixture
def begun(make_run):
    """begun(step, "training.schedule=constant", ...): starts a run with an empty file as its newest checkpoint; the
    result loads its run file with more overrides."""

    def make(step: int, *overrides: str, stage: str = "train"):
        run = make_run("begun", *overrides)
        storage.remove_tree(run.path("begun"))
        run_directory.claim(run, stage)
        storage.write_bytes(checkpoints.path_of(run.path("begun"), step), b"")
        return lambda *more: run_file.load(run_file.dump(run), list(more))

    return make


@pytest.mark.slow
def test_an_extended_run_equals_one_that_was_longer_from_the_start(make_scored_run):
    longer = make_scored_run("longer", *CONSTANT)
    train.run_stage(longer, in_process=True)
    short = make_scored_run("short", *CONSTANT, "training.examples_trained=96")
    assert train.run_stage(short, in_process=True)["steps"] == 3
    extended = run_file.load(run_file.dump(short), ["training.examples_trained=192"])
    assert train.run_stage(extended, in_process=True)["steps"] == 6
    assert_same_log_and_weights(extended, longer)
    with pytest.raises(ValueError, match="checkpoint after step 6, which is past the budget"):
        train.run_stage(short, in_process=True)


@pytest.mark.slow
def test_a_run_resumed_from_an_older_checkpoint_has_each_step_once_in_every_file(make_scored_run, shards, monkeypatch):
    sets = f"evaluation={{every_steps: 2, sets: [{{name: own, shards: '{shards}/*.parquet', tasks: [retrieval]}}]}}"
    run = make_scored_run("joint", sets)
    directory = run.path("joint")
    train.run_stage(run, in_process=True)
    before = [(line["step"], line["train/loss"]) for line in metrics_line.read(directory)]
    for name in (checkpoints.path_of(directory, 6), checkpoints.path_of(directory, 4), f"{directory}/manifest.json"):
        storage.remove(name)
    seen: list[tuple[int, ...]] = []

    def step_of(*arguments):
        if not seen:  # at the first step after the resume: what readers of the files see until the next checkpoint
            seen.append(tuple(line["step"] for line in metrics_line.read(directory)))
            seen.append(tuple(line["step"] for line in results.read(directory)))
            seen.append(tuple(selection_log.read_steps(directory)["step"].to_pylist()))
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", step_of)
    train.run_stage(run, in_process=True)
    assert seen == [(1, 2), (2,), (0, 1)]
    assert [(line["step"], line["train/loss"]) for line in metrics_line.read(directory)] == before
    assert [line["step"] for line in results.read(directory)] == [2, 4, 6]
    assert selection_log.read_steps(directory)["step"].to_pylist() == list(range(6))


def test_settings_outside_the_identity_may_change(begun):
    changed = begun(2)("training.n_learners=2", "reference.n_actors=7", "data.max_bad_share=0.5")
    assert run_directory.claim(changed) is None


def test_another_learning_rate_is_refused(begun):
    with pytest.raises(ValueError, match=r"training\.learning_rate: there 0\.001, here 0\.002"):
        run_directory.claim(begun(2)("training.learning_rate=0.002", "training.examples_trained=384"))


def test_a_run_with_a_cosine_schedule_cannot_be_extended(begun):
    longer = "training.examples_trained=384"
    with pytest.raises(ValueError, match=r"examples_trained: there 192, here 384.* cosine are the same up to step 0"):
        run_directory.claim(begun(2)(longer))
    # a custom training loop has a schedule of its own
    assert run_directory.claim(begun(2, stage="sub-batches")(longer), "sub-batches") is None


@pytest.mark.parametrize(
    ("step", "more", "until"),
    [
        (5, ["training.examples_trained=384"], None),  # the first of the two cool-down steps has the full learning rate
        (6, ["training.examples_trained=384"], 5),
        (5, ["training.cooldown_steps=1"], None),
        (5, ["training.cooldown_steps=4"], 3),
        (3, ["training.examples_trained=128"], None),  # a shorter run, whose cool-down begins now
        (4, ["training.examples_trained=128"], 3),
    ],
)
def test_a_budget_may_change_before_the_cool_down(begun, step: int, more: list[str], until: int | None):
    run = begun(step, *CONSTANT, "training.cooldown_steps=2")(*more)
    if until is None:
        assert run_directory.claim(run) is None
        assert manifests.read(run.path("begun"))["config"] == run_file.identity(run)
    else:
        with pytest.raises(ValueError, match=f"the same up to step {until} only"):
            run_directory.claim(run)


def test_checking_a_run_directory_writes_nothing(begun):
    run = begun(2, *CONSTANT)
    before = manifests.read(run().path("begun"))
    run_directory.refuse_other(run("training.examples_trained=384"))
    assert manifests.read(run().path("begun")) == before


def test_a_finished_run_is_not_asked_for_its_evaluation_sets(make_scored_run, capsys):
    """They may be gone by then; a run that is yet to train is refused without them where its loop evaluates."""
    sets = "sets: [{name: gone, shards: 'gone/*.parquet', tasks: [retrieval]}]"
    run = make_scored_run("joint", f"evaluation={{every_steps: 2, {sets}}}")
    begun = run_directory.claim(run)
    with pytest.raises(FileNotFoundError, match=r"evaluation\.sets: gone is not there"):
        train.run_stage(run)
    done = {"stage": "train", "complete": True, "config": run_file.identity(run)}
    manifests.finish(run.path(run.run_dir), done | {"examples_trained": 192, "seconds": 1.0})
    assert begun is None
    assert train.run_stage(run)["complete"]
    assert "gone" not in "".join(capsys.readouterr())


def test_before_the_first_checkpoint_any_budget_is_accepted(make_run):
    run_directory.claim(make_run("begun"))
    assert run_directory.claim(make_run("begun", "training.examples_trained=384")) is None
