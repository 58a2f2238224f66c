"""A custom training loop on jest's sub-batches: the example own_loop.py, run as a user runs it."""

import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest

from jest_core import run_file
from pipelines.base import checkpoints
from pipelines.training import selection_log
from tests.commands import Command, finish, write

LOOP = Path(__file__).parents[3] / "deploy" / "own_loop.py"


def test_the_example_has_at_most_25_lines():
    code = [line for line in LOOP.read_text().splitlines() if line and not line.startswith('"""')]
    assert len(code) <= 25


def prepare(make_scored_run, name: str, *overrides: str):
    return run_file.load(run_file.dump(make_scored_run("joint")), [f"run_dir={name}", *overrides])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_example_selects_logs_and_resumes_after_a_kill(make_scored_run, tmp_path):
    undisturbed, killed = (
        prepare(make_scored_run, name, "training.examples_trained=1600") for name in ("undisturbed", "killed")
    )
    loop, directory = [sys.executable, str(LOOP), str(write(killed, tmp_path))], killed.path("killed")
    with Command(tmp_path / "log", *loop) as first:
        first.wait_for_step(killed, 3)
        first.kill()
    assert checkpoints.steps(directory)[-1] < killed.n_steps
    finish(*loop)
    finish(sys.executable, str(LOOP), str(write(undisturbed, tmp_path)))
    assert selection_log.read(directory).equals(selection_log.read(undisturbed.path("undisturbed")))
    assert selection_log.read_steps(directory)["step"].to_pylist() == list(range(50))
    open_clip.create_model("jest-tiny", pretrained=checkpoints.path_of(directory, 50))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_processes_of_torchrun_draw_the_first_sub_batch_of_one(make_scored_run, tmp_path):
    one, two = (prepare(make_scored_run, name, "training.examples_trained=64") for name in ("one", "two"))
    finish(sys.executable, str(LOOP), str(write(one, tmp_path)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finish(sys.executable, *torchrun, str(LOOP), str(write(two, tmp_path)))
    logs = [selection_log.read(run.path(run.run_dir)) for run in (one, two)]
    first = [log.filter(np.array(log["step"]) == 0).drop_columns(["learner_loss", "draw_score"]) for log in logs]
    assert first[0].equals(first[1])
    assert len(logs[0]) == len(logs[1])


def test_a_custom_loop_refuses_to_train_at_two_resolutions(make_scored_run):
    from pipelines.training.sub_batches import SubBatches

    low = ["selection.score_patch_size=16", "training.low_resolution={patch_size: 16}"]
    run = prepare(make_scored_run, "low", *low)
    model = open_clip.create_model("jest-tiny")
    with pytest.raises(ValueError, match="trains at one resolution"):
        SubBatches(run, model, None)
