"""All stages as jobs of a Ray cluster of three nodes on this machine, with data on S3, while a node is lost."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from jest_core.run_file import Run
from pipelines import stages, submit
from pipelines.base import checkpoints, storage
from pipelines.reports import comparison
from pipelines.training import selection_log
from tests.conftest import free_port
from tests.laion import RUN_FILE, Laion, rehearsal

CHAIN = ["ingest", "catalogue", "reference-scores", "train", "evaluate", "report"]


# In addition to the rehearsal's: enough steps for a stop and the loss of a node. Compiling, a minute for each learner,
# is tested by test_train.py
SIZES = [
    "training.compile=false",
    "training.examples_trained=1920",
    "training.keep_last_checkpoints=1",
    "training.keep_checkpoint_every_steps=30",
]


@dataclass(frozen=True)
class Nodes:
    dashboard: str
    address: str


@pytest.fixture(scope="module")
def nodes(s3: str) -> Iterator[Nodes]:
    """A head without CPUs and two nodes with three each; started after the S3 server, whose address workers inherit."""
    from ray.cluster_utils import Cluster

    os.environ.pop("RAY_ADDRESS", None)
    # jobs run the `python` of the nodes' PATH
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    port = free_port()

    def node(n_cpus: int) -> dict[str, int]:
        return {
            "num_cpus": n_cpus,
            "object_store_memory": 300_000_000,
            "dashboard_agent_listen_port": free_port(),  # for jobs; by default all nodes would use the same port
        }

    head = node(0) | {"include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**node(3))
    yield Nodes(f"http://127.0.0.1:{port}", cluster.address)
    cluster.shutdown()


@pytest.fixture(scope="module")
def laion(s3: str) -> Iterator[Laion]:
    with rehearsal(f"{s3}/cluster") as laion:
        yield laion


def _submit(dashboard: str, stages: list[str], overrides: list[str], *words: str) -> subprocess.Popen[str]:
    """`jest submit` as a user calls it."""
    sets = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "pipelines", "submit", *stages, *map(str, (RUN_FILE, *sets, *words))]
    return subprocess.Popen(
        [*command, "--address", dashboard], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _train(overrides: list[str], address: str) -> str:
    """`jest train` on the cluster with this address; its output."""
    sets = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "pipelines", "train", *map(str, (RUN_FILE, *sets))]
    environment = os.environ | {"RAY_ADDRESS": address}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def _query(dashboard: str, *words: str) -> str:
    """The output of `jest submit` with options such as --status JOB."""
    command = [sys.executable, "-m", "pipelines", "submit", *words, "--address", dashboard]
    return subprocess.run(command, capture_output=True, text=True, check="--status" in words, timeout=100).stdout


def _learners() -> list[psutil.Process]:
    """Learners on this cluster, whose nodes are children of this process: another test may run learners too."""
    learners = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                learners.append(process)
    return learners


def _lose_the_node_of(process: psutil.Process) -> None:
    """Send SIGKILL to the raylet of this process and all that it started."""
    raylet = next(p for p in process.parents() if p.name() == "raylet")
    for each in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)


def _wait_for_a_checkpoint(directory: str, job: str, dashboard: str) -> None:
    deadline = time.monotonic() + 600
    while not checkpoints.steps(directory):
        assert submit.status(job, dashboard) == "RUNNING", _query(dashboard, "--logs", job)
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _stop_in_training(run: Run, overrides: list[str], dashboard: str) -> int:
    """Submit all stages and stop the job at its first checkpoint, whose step is returned. While the job runs, another
    one for the same run is refused."""
    directory = run.path(run.run_dir)
    output, _ = _submit(dashboard, CHAIN, overrides, "--detach").communicate(timeout=200)
    job = re.search(r"job (raysubmit_\w+)", output)[1]
    deadline = time.monotonic() + 200
    while submit.status(job, dashboard) == "PENDING":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert submit.status(job, dashboard) == "RUNNING"
    with pytest.raises(ValueError, match=f"job {job} works on"):
        submit.submit(run, ["train"], dashboard, {})
    _wait_for_a_checkpoint(directory, job, dashboard)
    submit.stop(job, dashboard)
    assert f"job {job}: STOPPED" in _query(dashboard, "--status", job)
    with pytest.raises(RuntimeError, match=f"job {job} STOPPED"):
        submit.follow(job, dashboard)
    return checkpoints.steps(directory)[-1]


def _lose_a_node_in_training(directory: str, reached: int, job: subprocess.Popen[str]) -> list[int]:
    """In a thread, wait for a checkpoint after the step reached, then kill a learner's node and append the step of the
    checkpoint to the list returned."""
    lost: list[int] = []

    def lose() -> None:
        while job.poll() is None and not lost:
            steps = checkpoints.steps(directory)
            if steps[-1] > reached and (learners := _learners()):
                _lose_the_node_of(learners[0])
                lost.append(steps[-1])
            time.sleep(0.3)

    threading.Thread(target=lose, daemon=True).start()
    return lost


def _check_results_of_each_stage(run: Run) -> pa.Table:
    """Check what the run file requires of each stage; returns the selection log."""
    directory = run.path(run.run_dir)
    fetched = storage.read_json(f"{run.path('shards')}/manifest.json")
    assert fetched["rows"] == {"kept": 397, "url": 0, "unsafe": 3}
    assert fetched["passes"][0]["reasons"]["success"] == 392
    kept = storage.read_json(f"{run.path('catalogue')}/manifest.json")
    assert kept["counts"].items() >= {"kept": 387, "caption": 5}.items()
    log = selection_log.read(directory)
    assert set(log["chunk"].to_pylist()) >= set(range(16))
    assert sorted(set(log["step"].to_pylist())) == list(range(run.n_steps))
    done = comparison.read_run(directory)
    assert [line["step"] for line in done.metrics if "jest/score_spearman" in line] == list(range(1, run.n_steps, 10))
    assert checkpoints.steps(directory) == [30, run.n_steps]
    results = {(line["key"], metric) for line in done.results for metric in line["metrics"]}
    assert results >= {
        ("imagenet/zero_shot", "acc1"),
        ("imagenet/few_shot", "acc1"),
        ("coco/retrieval", "image_retrieval_recall@1"),
    }
    assert {line["step"] for line in done.results} == {30, run.n_steps}
    assert storage.exists(f"{directory}/report.html")
    return log


def _check_no_credentials_are_shown(directory: str, dashboard: str, *outputs: str) -> None:
    """No output of the commands, job entry or file of the run directory has the secret key."""
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    with urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=30) as answer:
        jobs = answer.read().decode()
    assert len(json.loads(jobs)) >= 3
    written = [
        storage.read_bytes(f"{directory}/{name}").decode() for name in ("run.yaml", "report.html", "manifest.json")
    ]
    assert secret
    assert not [text for text in (*outputs, jobs, *written) if secret in text]


@pytest.mark.endurance
@pytest.mark.timeout(1200)
def test_laion_2b_runs_as_jobs_that_are_stopped_and_survive_the_loss_of_a_node(nodes: Nodes, laion: Laion, capsys):
    """Three jobs for one run: one is stopped, one refused for another learning rate, one resumes and loses a node. The
    log equals that of an undisturbed run. One test for all of this, since jobs and learners start slowly."""
    dashboard, run, undisturbed = nodes.dashboard, laion.run("chain", *SIZES), laion.run("undisturbed", *SIZES)
    directory, overrides = run.path(run.run_dir), laion.overrides("chain", *SIZES)
    reached = _stop_in_training(run, overrides, dashboard)
    assert 0 < reached < run.n_steps

    failed = _submit(dashboard, ["train"], [*overrides, "training.learning_rate=0.5"])
    refused, _ = failed.communicate(timeout=200)
    assert failed.returncode == 2
    assert "training.learning_rate" in refused  # a run cannot be resumed with another learning rate

    job = _submit(dashboard, CHAIN, overrides)
    lost = _lose_a_node_in_training(directory, reached, job)
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output
    assert lost, "the run ended before a node was lost"
    assert lost[0] < run.n_steps
    assert [stage for stage in CHAIN if stage not in re.findall(r"^([a-z-]+): ", output, re.MULTILINE)] == []
    assert output.count("already at") >= 3, output  # the stages that the stopped job had finished

    log = _check_results_of_each_stage(run)

    # running the stages again repeats nothing, and an undisturbed run has the same selection log
    capsys.readouterr()
    stages.run_stages(run, CHAIN)
    again = capsys.readouterr().out
    assert again.count("already at") >= 4, again
    other = _train(laion.overrides("undisturbed", *SIZES), nodes.address)
    assert log.equals(selection_log.read(undisturbed.path(undisturbed.run_dir))), other

    _check_no_credentials_are_shown(directory, dashboard, output, refused, again, other)

    # without an address, `connect` starts a Ray of its own and does not join this cluster
    code = "import ray; from pipelines.base import cluster; cluster.connect(); print(len(ray.nodes()), 'node')"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert alone.stdout == "1 node\n"
