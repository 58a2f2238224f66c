"""Runs that are killed, stopped, hung or out of disk: they end as a quiet one does, and nothing of them is left."""

import contextlib
import json
import signal

import psutil
import pytest

from jest_core import run_file, tables
from jest_core.run_file import Run
from pipelines.base import checkpoints, storage
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from pipelines.training import selection_log, train
from tests.commands import Command, command, finish, same_log_and_weights, write

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200), pytest.mark.usefixtures("all_cores")]


@pytest.fixture
def prepared(make_scored_run) -> Run:
    return make_scored_run("joint")


def changed(run: Run, name: str, *overrides: str) -> Run:
    return run_file.load(run_file.dump(run), [f"run_dir={name}", *overrides])


def _holds_pytorch(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("libtorch" in region.path for region in process.memory_maps())
    return False


def test_a_run_that_is_stopped_in_every_way_ends_as_a_quiet_one(prepared, tmp_path):
    """By Ctrl-C, by SIGTERM, which waits for a checkpoint, and by SIGKILL; then the same command goes on."""
    quiet = changed(prepared, "quiet", "training.examples_trained=3200", "training.checkpoint_every_steps=1000")
    by_time = ["training.checkpoint_every_minutes=0.005", "training.keep_last_checkpoints=2"]  # none is due by number
    stopped = changed(quiet, "stopped", *by_time)
    directory, words = stopped.path("stopped"), command("train", write(stopped, tmp_path))
    reached = 0
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL), (None, 0)):
        with Command(tmp_path / f"log-{number}", *words) as running:
            if number is not None:
                running.wait_for_step(stopped, reached + 1)
                assert not running.all("TrainController")
                running.wait_until(lambda running=running: bool(running.all("MapBatches")))
                assert not [reader for reader in running.all("ray::") if _holds_pytorch(reader)]
                running.process.send_signal(number)
            assert running.ended(60 if number is signal.SIGINT else 300) == status, running.output
            assert f"resumes after step {reached} of" in running.output or not reached
            for noise in ("Traceback", "Started a local Ray", "StackTrace"):  # by what still reads for the stopped loop
                assert noise not in running.output
        reached = checkpoints.steps(directory)[-1]
        if number is signal.SIGINT:
            assert "the same command goes on from what is done" in running.output
        if number is signal.SIGTERM:
            assert f"stopped with a checkpoint after step {reached};" in running.output
        assert (reached == stopped.n_steps) == (number is None)
    assert json.loads(storage.read_bytes(f"{directory}/manifest.json"))["complete"]
    assert len(checkpoints.steps(directory)) == 2
    train.run_stage(quiet)
    same_log_and_weights(stopped, quiet)


@pytest.mark.parametrize("when", ["starting", "training"])
def test_ctrl_c_ends_two_learners(prepared, tmp_path, when: str):
    run = changed(prepared, "stopped", "training.examples_trained=32000", "training.n_learners=2")
    with Command(tmp_path / "log", *command("train", write(run, tmp_path))) as train:
        if when == "training":
            train.wait_for_step(run)
            assert train.all("TrainController")
        train.wait_until(lambda: " starts, " in train.output)
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
