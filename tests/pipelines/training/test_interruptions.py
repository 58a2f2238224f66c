"""Runs that are stopped, killed or hang: they can be resumed to the end of an undisturbed run, and leave no process."""

import contextlib
import json
import signal

import psutil
import pytest

from jest_core import run_file, tables
from jest_core.run_file import Run
from pipelines.base import checkpoints, storage
from pipelines.stream import read_ahead, super_batches
from pipelines.stream.source import open_source
from pipelines.training import selection_log, train
from tests.commands import Command, assert_same_log_and_weights, command, finish, write

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.usefixtures("all_cores")]


@pytest.fixture
def prepared(make_scored_run) -> Run:
    return make_scored_run("joint")


def changed(run: Run, name: str, *overrides: str) -> Run:
    return run_file.load(run_file.dump(run), [f"run_dir={name}", *overrides])


def _has_loaded_pytorch(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("libtorch" in region.path for region in process.memory_maps())
    return False


def test_a_run_stopped_by_sigint_sigterm_and_sigkill_ends_like_an_undisturbed_one(prepared, tmp_path):
    """SIGINT, SIGTERM, which waits for a checkpoint, and SIGKILL in turn; the same command resumes after each."""
    undisturbed = changed(
        prepared, "undisturbed", "training.examples_trained=3200", "training.checkpoint_every_steps=1000"
    )
    by_time = [
        "training.checkpoint_every_minutes=0.005",
        "training.keep_last_checkpoints=2",
    ]  # no checkpoint is due by its step
    stopped = changed(undisturbed, "stopped", *by_time)
    directory, words = stopped.path("stopped"), command("train", write(stopped, tmp_path))
    reached = 0
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL), (None, 0)):
        with Command(tmp_path / f"log-{number}", *words) as running:
            if number is not None:
                running.wait_for_step(stopped, reached + 1)
                assert not running.processes("TrainController")
                running.wait_until(lambda running=running: bool(running.processes(read_ahead.TASK)))
                assert not [reader for reader in running.processes("ray::") if _has_loaded_pytorch(reader)]
                running.process.send_signal(number)
            assert running.exit_status(60 if number is signal.SIGINT else 300) == status, running.output
            assert f"resumes after step {reached} of" in running.output or not reached
            for noise in ("Traceback", "Started a local Ray", "StackTrace"):  # printed if prefetching outlives the loop
                assert noise not in running.output
        reached = checkpoints.steps(directory)[-1]
        if number is signal.SIGINT:
            assert "the same command goes on from what is done" in running.output
        if number is signal.SIGTERM:
            assert f"stopped with a checkpoint after step {reached};" in running.output
        assert (reached == stopped.n_steps) == (number is None)
    assert json.loads(storage.read_bytes(f"{directory}/manifest.json"))["complete"]
    assert len(checkpoints.steps(directory)) == 2
    train.run_stage(undisturbed)
    assert_same_log_and_weights(stopped, undisturbed)


@pytest.mark.parametrize("when", ["starting", "training"])
def test_ctrl_c_ends_two_learners(prepared, tmp_path, when: str):
    run = changed(prepared, "stopped", "training.examples_trained=32000", "training.n_learners=2")
    with Command(tmp_path / "log", *command("train", write(run, tmp_path))) as train:
        if when == "training":
            train.wait_for_step(run)
            assert train.processes("TrainController")
        train.wait_until(lambda: " starts, " in train.output)
        train.process.send_signal(signal.SIGINT)
        assert train.exit_status(60) == 130, train.output
        assert "the same command goes on from what is done" in train.output


def test_a_learner_that_hangs_is_named_and_no_process_is_left(prepared, tmp_path):
    run = changed(
        prepared, "hung", "training.examples_trained=32000", "training.n_learners=2", "training.hang_minutes=0.5"
    )
    with Command(tmp_path / "log", *command("train", write(run, tmp_path))) as train:
        train.wait_for_step(run)
        workers = train.processes("RayTrainWorker")
        assert len(workers) == 2
        workers[0].send_signal(signal.SIGSTOP)
        assert train.exit_status(120) == 1, train.output
        assert "no learner has moved for 0.5 minutes" in train.output
        message = next(line for line in train.output.splitlines() if line.startswith("jest: ")).split(": ")[2]
        learners = message.split("; ")
        assert len([each for each in learners if ", silent for " in each]) == 1, train.output
        assert all(each.startswith("learner ") for each in learners[:2])


def test_a_killed_run_resumes_on_more_learners_at_the_same_example(prepared, tmp_path):
    """The log of a uniform run shows its stream: resumed on two learners instead of one, it skips or repeats no row."""
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
