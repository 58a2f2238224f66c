"""data.replay: a run trains on the sub-batches in another run's log, at the same steps, without scoring."""

import subprocess
import sys

import numpy as np
import pytest

from jest_core import run_file
from pipelines.base import checkpoints, shard_paths, storage
from pipelines.data import catalogue
from pipelines.training import metrics_line, replay, selection_log, train


def picked(run) -> list[list[str]]:
    log = selection_log.read(run.path(run.run_dir))
    log = log.filter(log["selected"])
    steps = log["step"].to_numpy()
    uids = np.array(log["uid"].to_pylist())
    return [sorted(uids[steps == step].tolist()) for step in range(run.n_steps)]


@pytest.mark.long
def test_a_replay_trains_on_the_same_sub_batches_and_has_the_same_losses(make_scored_run, tmp_path):
    run = make_scored_run("joint")
    train.run_stage(run, in_process=True)
    path = tmp_path / "replayed.yaml"
    path.write_text(run_file.dump(run))
    storage.remove_tree(run.path("scores"))  # a replay needs no scores
    command = [sys.executable, "-m", "pipelines", "train", str(path), "--replay", "joint"]
    two = ["--set", "run_dir=replayed", "--set", "training.n_learners=2"]
    done = subprocess.run([*command, *two], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    again = run_file.load(storage.read_bytes(f"{run.path('replayed')}/run.yaml").decode())
    assert picked(again) == picked(run)
    losses = [[line["train/loss"] for line in metrics_line.read(each.path(each.run_dir))] for each in (run, again)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.slow
def test_a_replay_reads_only_its_steps_and_refuses_what_does_not_fit(make_scored_run):
    run = make_scored_run("joint")
    train.run_stage(run, in_process=True)
    text = run_file.dump(run)
    chosen = ["data.replay=joint", "selection.method=uniform", "run_dir=replayed"]
    again = run_file.load(text, chosen)
    shares = [list(replay.stream(again, 32, rank=rank, n_learners=4, first_step=3)) for rank in range(4)]
    for step, parts in enumerate(zip(*shares, strict=True), start=3):
        rows = [row for part in parts for row in part.identities().select(["shard", "row"]).to_pylist()]
        assert rows == sorted(
            rows, key=lambda row: (row["shard"], row["row"])
        )  # so that few row groups are read by two learners
        assert sorted(u for part in parts for u in part.identities()["uid"].to_pylist()) == picked(run)[step]
    with pytest.raises(ValueError, match=r"set selection.method to uniform"):
        run_file.load(text, ["data.replay=joint"])
    with pytest.raises(ValueError, match=r"selected 32 a step, and training.sub_batch_size is 16"):
        replay.refuse(run_file.load(text, [*chosen, "training.sub_batch_size=16"]))
    with pytest.raises(ValueError, match=r"has 6 committed steps, and the run wants 7.*to at most 192"):
        replay.refuse(run_file.load(text, [*chosen, "training.examples_trained=224"]))
    backwards = shard_paths.expand([run.data.shards], ".")[::-1]
    other = run_file.load(text, [*chosen, "data.catalogue=other", f"data.shards={backwards}"])
    catalogue.run_stage(other)
    with pytest.raises(Exception, match="other uids than in the log of joint; replay with the catalogue"):
        next(replay.stream(other, 32, rank=0, n_learners=1, first_step=0))


def test_a_resumed_replay_reads_only_its_remaining_steps(make_run, tmp_path):
    parts = ["00000000-00000002.parquet", "00000003-00000007.parquet"]
    checkpoints.write(str(tmp_path / "joint"), 8, {"jest": {"log_parts": parts}})
    run = make_run("again", "data.replay=joint", "selection.method=uniform")
    planned = [(steps.part.rsplit("/", 1)[1], list(steps.row_groups)) for steps in replay._plan(run, 2, 2)]
    assert planned == [(parts[0], [2]), (parts[1], [0, 1]), (parts[1], [2])]  # the run ends after 6 steps
