"""A loop of one's own on jest's sub-batches: the example, as its reader runs it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest

from jest_core import config as run_files
from pipelines import checkpoints, selection_log

LOOP = Path(__file__).parents[2] / "deploy" / "own_loop.py"


def test_the_example_has_25_lines():
    code = [line for line in LOOP.read_text().splitlines() if line and not line.startswith('"""')]
    assert len(code) <= 25


def prepare(make_scored_run, tmp_path, name: str, *overrides: str):
    run = run_files.load(run_files.dump(make_scored_run("joint")), [f"run_dir={name}", *overrides])
    path = tmp_path / f"{name}.yaml"
    path.write_text(run_files.dump(run))
    return run, str(path)


def loop(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_example_selects_logs_and_resumes_after_a_kill(make_scored_run, tmp_path):
    quiet, quiet_file = prepare(make_scored_run, tmp_path, "quiet", "training.examples_trained=1600")
    killed, killed_file = prepare(make_scored_run, tmp_path, "killed", "training.examples_trained=1600")
    directory = killed.path("killed")
    process = subprocess.Popen([sys.executable, LOOP, killed_file], start_new_session=True)
    deadline = time.monotonic() + 200
    while len(checkpoints.steps(directory)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoints.steps(directory)[-1] < killed.n_steps
    loop(sys.executable, str(LOOP), killed_file)
    loop(sys.executable, str(LOOP), quiet_file)
    assert selection_log.read(directory).equals(selection_log.read(quiet.path("quiet")))
    assert selection_log.read_steps(directory)["step"].to_pylist() == list(range(50))
    open_clip.create_model("jest-tiny", pretrained=checkpoints.path_of(directory, 50))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_processes_of_torchrun_draw_the_first_sub_batch_of_one(make_scored_run, tmp_path):
    one, one_file = prepare(make_scored_run, tmp_path, "one", "training.examples_trained=64")
    two, two_file = prepare(make_scored_run, tmp_path, "two", "training.examples_trained=64")
    loop(sys.executable, str(LOOP), one_file)
    loop(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(LOOP), two_file)
    logs = [selection_log.read(run.path(run.run_dir)) for run in (one, two)]
    first = [log.filter(np.array(log["step"]) == 0).drop_columns(["learner_loss", "draw_score"]) for log in logs]
    assert first[0].equals(first[1])
    assert len(logs[0]) == len(logs[1])


def test_a_loop_of_ones_own_trains_at_one_resolution(make_scored_run, tmp_path):
    from pipelines.sub_batches import SubBatches

    run, _ = prepare(
        make_scored_run, tmp_path, "low", "selection.score_patch_size=16", "training.low_resolution={patch_size: 16}"
    )
    model = open_clip.create_model("jest-tiny")
    with pytest.raises(ValueError, match="trains at one resolution"):
        SubBatches(run, model, None)
