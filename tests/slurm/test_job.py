"""deploy/slurm/jest.sbatch on a real Slurm of three nodes: limits, preemptions, lost nodes, failures, cancels."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import checkpoints
from pipelines.training import selection_log, train
from tests.commands import write
from tests.slurm.cluster import PROGRAMS, Job, Slurm

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
# One learner in each process of Ray Train, a small object store, and no dashboard: less to start
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
    "JEST_RAY_OPTIONS": "--object-store-memory=100000000",
    "JEST_HEAD_OPTIONS": "--include-dashboard=false",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        assert "CI" not in os.environ, f"{missing}: run tests/install.sh first"
        pytest.skip(f"no {', '.join(missing)}: tests/install.sh installs Slurm, as root on Debian")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def submit(slurm: Slurm, folder: Path, run: Run, *options: str, **environment: str) -> Job:
    """Train a run as a job on two of the three nodes."""
    words = ["train", str(write(run, folder))]
    return Job(slurm, folder / "job", ["--nodes=2", *options], words, **(ENVIRONMENT | environment))


def wait_for_a_checkpoint(job: Job, directory: str) -> None:
    """After those that are there."""
    reached = (checkpoints.steps(directory) or [0])[-1]
    job.wait_until(lambda: (checkpoints.steps(directory) or [0])[-1] > reached)


def next_run(job: Job, n: int) -> str:
    """Wait for the run after the n-th; its nodes."""
    job.wait_until(lambda: f"run {n + 1} of job" in job.output)
    return re.findall(rf"run {n + 1} of job \d+ on (\S+)", job.output)[0]


def wait_for(job: Job, name: str) -> psutil.Process:
    """A process of the job whose command line contains `name`."""
    job.wait_until(lambda: bool(job.slurm.processes(name)))
    return job.slurm.processes(name)[0]


def test_a_job_at_its_limit_preempted_and_with_a_lost_node_ends_like_an_undisturbed_run(
    slurm: Slurm, make_scored_run, tmp_path: Path, all_cores: None
):
    """One job for all of this, since each run of it takes Ray's start."""
    undisturbed: Run = make_scored_run(
        "undisturbed", "training.examples_trained=6400", "training.n_learners=2", "training.checkpoint_every_steps=1000"
    )
    run = run_file.load(run_file.dump(undisturbed), ["run_dir=run", "training.checkpoint_every_minutes=0.005"])
    directory = run.path(run.run_dir)
    job = submit(slurm, tmp_path, run, "--signal=B:USR1@60", JEST_STOP_SECONDS="50")

    wait_for_a_checkpoint(job, directory)
    stopped = slurm.processes("RayTrainWorker")
    assert len(stopped) == 2
    for learner in stopped:
        learner.suspend()  # as in a long step: Slurm looks at limits every 30 s
    slurm.call("scontrol", "update", f"JobId={job.id}", "EndTime=now+70")
    job.wait_until(lambda: "is near" in job.output)
    reached = checkpoints.steps(directory)[-1]
    for learner in stopped:
        learner.resume()
    assert next_run(job, 1) == "node[1-2]"
    last = int(re.findall(r"stopped with a checkpoint after step (\d+)", job.output)[0])
    assert checkpoints.steps(directory)[-1] == last > reached

    wait_for_a_checkpoint(job, directory)
    slurm.call("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    next_run(job, 2)
    assert len(re.findall(r"stopped with a checkpoint after step (\d+)", job.output)) == 2

    wait_for_a_checkpoint(job, directory)
    slurm.call("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test")
    assert next_run(job, 3) == "node[2-3]"
    slurm.call("scontrol", "update", "NodeName=node1", "State=RESUME")
    assert job.end() == ("COMPLETED", "0:0"), job.output
    assert not slurm.processes()
    train.run_stage(undisturbed)
    log = selection_log.read(directory)
    assert log.equals(selection_log.read(undisturbed.path("undisturbed")))


def test_a_cancelled_job_leaves_no_process_and_its_ray_refuses_others(slurm: Slurm, make_scored_run, tmp_path: Path):
    run: Run = make_scored_run("joint", "training.examples_trained=32000", "training.n_learners=2")
    job = submit(slurm, tmp_path, run)
    wait_for_a_checkpoint(job, run.path(run.run_dir))
    driver = wait_for(job, "stages train")
    address, token = (driver.environ()[name] for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        for other, nodes in (("another", "AuthenticationError"), (token, "2 nodes")):
            code = f"import ray; ray.init({address!r}); print(len(ray.nodes()), 'nodes')"
            patch.setenv("RAY_AUTH_TOKEN", other)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            assert nodes in done.stdout + done.stderr
    assert not slurm.processes(token)  # as a word of a command line
    assert len(slurm.processes("raylet --raylet_socket_name")) == 2
    slurm.call("scancel", job.id)
    assert job.end()[0] == "CANCELLED"
    deadline = time.monotonic() + 10
    while slurm.processes():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert job.shown("Restarts") == "0"


def test_failures_are_followed_by_another_run_up_to_a_bound(slurm: Slurm, make_scored_run, tmp_path: Path):
    run: Run = make_scored_run("joint", "training.examples_trained=32000")
    job = submit(slurm, tmp_path, run, "--nodes=1", JEST_MAX_FAILURES="1")
    wait_for(job, "stages train")
    wait_for(job, "raylet --raylet_socket_name").kill()
    next_run(job, 1)
    assert "Ray ended on a node: requeued" in job.output
    wait_for(job, "stages train").kill()
    assert job.end() == ("FAILED", "1:0"), job.output
    assert "jest ended with status 137: ends, after 2 failures" in job.output
    assert not slurm.processes()


def test_what_would_fail_again_is_not_requeued(slurm: Slurm, make_run, tmp_path: Path):
    job = submit(slurm, tmp_path, make_run("joint"), "--nodes=1")  # without a catalogue
    assert job.end() == ("FAILED", "2:0"), job.output
    assert "run `jest catalogue` first" in job.output
    assert "jest ended with status 2: it would fail again" in job.output
    assert job.shown("Restarts") == "0"


def test_a_head_that_cannot_start_ends_the_job_with_its_log(slurm: Slurm, make_run, tmp_path: Path):
    job = submit(slurm, tmp_path, make_run("joint"), JEST_RAY_OPTIONS="--object-store-memory=1")
    assert job.end() == ("FAILED", "1:0"), job.output
    assert "Attempting to cap object store memory usage at 1 bytes" in job.output
    assert "Ray has not started on node1 node2: ends" in job.output
    assert not slurm.processes()


def test_the_script_says_what_is_not_on_the_path(slurm: Slurm, make_run, tmp_path: Path):
    job = submit(slurm, tmp_path, make_run("joint"), PATH="/usr/bin:/bin")
    assert job.end() == ("FAILED", "127:0"), job.output
    assert "ray is not on the PATH of node1" in job.output
