"""Runs that are killed, stopped, hung or out of disk: they end as a quiet one does, and nothing of them is left."""

import json
import signal

import pytest

from jest_core import config as run_files
from jest_core import tables
from jest_core.config import Run
from pipelines import checkpoints, learner, selection_log, storage, super_batches
from pipelines.source import open_source
from tests.commands import Command, command, finish, same_log_and_weights, write

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.usefixtures("all_cores")]


@pytest.fixture
def prepared(make_scored_run) -> Run:
    return make_scored_run("joint")


def changed(run: Run, name: str, *overrides: str) -> Run:
    return run_files.load(run_files.dump(run), [f"run_dir={name}", *overrides])


def test_a_run_whose_process_is_killed_goes_on_as_if_nothing_had_been(prepared, tmp_path):
    steps = ["training.examples_trained=640", "training.checkpoint_every_steps=5"]
    quiet, killed = changed(prepared, "quiet", *steps), changed(prepared, "killed", *steps)
    train = command("train", write(killed, tmp_path))
    with Command(tmp_path / "log", *train) as first:
        first.wait_for_step(killed)
        first.process.kill()
        first.ended()
    assert checkpoints.steps(killed.path("killed"))[-1] < killed.n_steps
    assert "resumes after step" in finish(*train)
    assert json.loads(storage.read_bytes(killed.path("killed/manifest.json")))["complete"]
    learner.run_stage(quiet)
    same_log_and_weights(killed, quiet)


def test_two_learners_outlive_the_kill_of_one_and_that_of_their_node(prepared, tmp_path):
    """Each holds half of the weights. Ray Train starts a killed learner again by itself; after the kill of every
    process of the node the same command goes on."""
    two = ["training.examples_trained=960", "training.checkpoint_every_steps=5"]
    two += ["training.n_learners=2", "training.shard_weights=true"]
    quiet, killed = changed(prepared, "quiet", *two), changed(prepared, "killed", *two)
    train = command("train", write(killed, tmp_path))
    with Command(tmp_path / "log", *train) as first:
        first.wait_for_step(killed)
        before = first.all("RayTrainWorker")
        assert len(before) == 2
        before[0].kill()
        reached = checkpoints.steps(killed.path("killed"))[-1]
        first.wait_for_step(killed, reached + 5)
        assert set(first.all("RayTrainWorker")).isdisjoint(before)
        first.kill()
    assert checkpoints.steps(killed.path("killed"))[-1] < killed.n_steps
    with Command(tmp_path / "log", *train) as again:
        assert again.ended() == 0, again.output
        assert "resumes after step" in again.output
    learner.run_stage(quiet)
    same_log_and_weights(killed, quiet)


def test_sigterm_stops_after_a_checkpoint_and_the_same_command_goes_on(prepared, tmp_path):
    quiet = changed(prepared, "quiet", "training.examples_trained=1600", "training.checkpoint_every_steps=1000")
    by_time = ["training.checkpoint_every_minutes=0.005", "training.keep_last_checkpoints=2"]  # none is due by number
    stopped = changed(quiet, "stopped", *by_time)
    directory, train = stopped.path("stopped"), command("train", write(stopped, tmp_path))
    with Command(tmp_path / "log", *train) as first:
        first.wait_for_step(stopped)
        first.process.send_signal(signal.SIGTERM)
        assert first.ended() == 128 + signal.SIGTERM, first.output
        reached = checkpoints.steps(directory)[-1]
        assert f"stopped with a checkpoint after step {reached};" in first.output
    assert reached < stopped.n_steps
    with Command(tmp_path / "again", *train) as again:
        assert again.ended() == 0, again.output
        assert f"resumes after step {reached} of" in again.output
    assert len(checkpoints.steps(directory)) == 2
    learner.run_stage(quiet)
    same_log_and_weights(stopped, quiet)


@pytest.mark.parametrize("n_learners", [1, 2])
def test_ctrl_c_leaves_nothing_behind(prepared, tmp_path, n_learners: int):
    run = changed(prepared, "stopped", "training.examples_trained=32000", f"training.n_learners={n_learners}")
    with Command(tmp_path / "log", *command("train", write(run, tmp_path))) as train:
        train.wait_for_step(run)
        assert bool(train.all("TrainController")) == (n_learners == 2)
        train.process.send_signal(signal.SIGINT)
        assert train.ended(60) == 130, train.output
        assert "the same command goes on from what is done" in train.output


def test_a_learner_that_hangs_is_named_and_nothing_of_the_run_stays_behind(prepared, tmp_path):
    run = changed(
        prepared, "hung", "training.examples_trained=32000", "training.n_learners=2", "training.hang_minutes=0.5"
    )
    with Command(tmp_path / "log", *command("train", write(run, tmp_path))) as train:
        train.wait_for_step(run)
        workers = train.all("RayTrainWorker")
        assert len(workers) == 2
        workers[0].send_signal(signal.SIGSTOP)
        assert train.ended(120) == 1, train.output
        assert "no learner has moved for 0.5 minutes" in train.output
        silent = next(line for line in train.output.splitlines() if line.startswith("jest: ")).split(": ")[2]
        told = silent.split("; ")
        assert len([each for each in told if ", silent for " in each]) == 1, train.output
        assert all(each.startswith("learner ") for each in told[:2])


def test_a_killed_run_goes_on_with_other_learners_at_the_same_example(prepared, tmp_path):
    """A uniform run's log is the stream: after SIGKILL, on two learners instead of one, none is lost or doubled."""
    settings = ["selection.method=uniform", "training.examples_trained=1600", "training.checkpoint_every_steps=10"]
    run = changed(prepared, "killed", *settings)
    batches = super_batches.stream(run, open_source(run), 32, rank=0, n_learners=1, first_step=0)
    names = ("uid_high", "uid_low", "occurrence", "shard", "row")
    expected = [row for batch in batches for row in zip(*(batch.rows[n].to_pylist() for n in names), strict=True)]
    assert len(expected) == 1600
    assert len(set(expected)) == 1600
    train = command("train", write(run, tmp_path))
    with Command(tmp_path / "log", *train) as first:
        first.wait_for_step(run)
        first.kill()
    assert checkpoints.steps(run.path("killed"))[-1] < run.n_steps
    assert "resumes after step" in finish(*train, "--set", "training.n_learners=2")
    log = selection_log.read(run.path("killed"))
    assert log["step"].to_pylist() == [step for step in range(50) for _ in range(32)]
    high, low = tables.uid_from_hex(log["uid"].to_pylist())
    rest = [log[name].to_pylist() for name in names[2:]]
    assert list(zip(high.tolist(), low.tolist(), *rest, strict=True)) == expected
