"""`make chaos`: a run whose processes are killed again and again ends like an undisturbed one."""

import os
import random
import signal
import time
from functools import partial

import pytest

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import checkpoints, commits, storage
from pipelines.stream import read_ahead
from pipelines.training import metrics_line, selection_log, train
from tests.commands import Command, assert_same_log_and_weights, bursts, command, write
from tests.faults import FaultyProxy

SEED = int(os.environ.get("JEST_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
# victims by process title; "node" stands for all processes of the command at once
N_KILLS = {"RayTrainWorker": 5, read_ahead.TASK: 11, "driver": 2, "node": 2}


@pytest.mark.chaos
@pytest.mark.timeout(2400)
def test_a_run_under_twenty_kills_ends_like_an_undisturbed_one(make_scored_run, tmp_path, s3_server, s3):
    """On two learners with half of the weights each, and an S3 server that fails one request in twenty-five, in four
    ways. Ray Train restarts a killed learner, and Ray a killed reader."""
    print(f"JEST_CHAOS_SEED={SEED}")
    rng = random.Random(SEED)
    run: Run = make_scored_run("joint")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3}/chaos/{path.relative_to(tmp_path)}", path.read_bytes())
    proxy = FaultyProxy(s3_server.url, dict.fromkeys(("503", "500", "slow", "reset"), 0.01), seed=SEED)
    steps = [
        f"root={s3}/chaos",
        "training.n_learners=2",
        "training.shard_weights=true",
        "training.examples_trained=4800",
        "training.checkpoint_every_steps=4",
        "training.max_failures=-1",
    ]
    undisturbed, killed = (
        run_file.load(run_file.dump(run), [f"run_dir={name}", *steps]) for name in ("undisturbed", "killed")
    )
    directory, log, words = killed.path("killed"), tmp_path / "log", command("train", write(killed, tmp_path))
    faulty = {"AWS_ENDPOINT_URL": proxy.url}
    driver, dead = Command(log, *words, **faulty), []
    for burst in bursts(N_KILLS, rng):
        reached = (checkpoints.steps(directory) or [0])[-1]
        driver.wait_for_step(killed, reached + 1)  # the run has to make progress between two bursts
        for victim in burst:
            time.sleep(rng.uniform(0, 0.5))
            if victim in ("RayTrainWorker", read_ahead.TASK):
                driver.wait_until(partial(driver.kill_one, victim, rng))
            else:
                assert driver.process.poll() is None, driver.output
                driver.kill() if victim == "node" else driver.process.kill()
                assert driver.exit_status() == -signal.SIGKILL
                dead.append(driver)
                while driver.processes("RayTrainWorker"):  # two commands in one run directory are not tested here
                    time.sleep(0.1)
                driver = Command(log, *words, **faulty)
            print(f"{victim} killed after step {checkpoints.steps(directory)[-1]} of {killed.n_steps}", flush=True)
    with driver:
        assert driver.exit_status(600) == 0, driver.output
    for each in dead:
        each.__exit__()  # a fixture checks after all tests that none of its processes is left
    proxy.close()
    print(f"requests: {dict(proxy.counts)}", flush=True)
    assert min(proxy.counts[name] for name in ("503", "500", "slow", "reset")) >= 3
    kept = {f"{prefix}{name}" for name in commits.read(directory) for prefix in ("", "steps-")}
    assert set(storage.names(f"{directory}/selection")) == kept | {commits.FILE}

    train.run_stage(undisturbed)
    assert_same_log_and_weights(undisturbed, killed)
    assert selection_log.read_steps(directory).equals(selection_log.read_steps(undisturbed.path("undisturbed")))
    losses = [
        [line["train/loss"] for line in metrics_line.read(where)]
        for where in (directory, undisturbed.path("undisturbed"))
    ]
    assert losses[0] == losses[1]
