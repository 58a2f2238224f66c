"""A cluster of several nodes on this machine: the whole chain by the job API, on S3, while a node is lost."""

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


# Beside the rehearsal's: steps enough for a stop and a loss. Each learner would compile a minute: test_train.py does
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
    """A head without CPUs and two nodes with three each; after the S3 server, whose address its workers inherit."""
    from ray.cluster_utils import Cluster

    os.environ.pop("RAY_ADDRESS", None)
    # a job's `python` is that of its nodes
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    port = free_port()

    def node(n_cpus: int) -> dict[str, int]:
        return {
            "num_cpus": n_cpus,
            "object_store_memory": 300_000_000,
            "dashboard_agent_listen_port": free_port(),  # of jobs; by itself all nodes would take the same
        }

    head = node(0) | {"include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**node(3))
    yield Nodes(f"http://127.0.0.1:{port}", cluster.address)
    cluster.shutdown()


@pytest.fixture(scope="module")
def laion(s3: str) -> Iterator[Laion]:
    with rehearsal(f"{s3}/cluster") as made:
        yield made


def _submit(dashboard: str, stages: list[str], told: list[str], *words: str) -> subprocess.Popen[str]:
    """`jest submit` as a user calls it."""
    sets = [word for override in told for word in ("--set", override)]
    command = [sys.executable, "-m", "pipelines", "submit", *stages, *map(str, (RUN_FILE, *sets, *words))]
    return subprocess.Popen(
        [*command, "--address", dashboard], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _train(told: list[str], address: str) -> str:
    """`jest train` on the cluster with this address; what it said."""
    sets = [word for override in told for word in ("--set", override)]
    command = [sys.executable, "-m", "pipelines", "train", *map(str, (RUN_FILE, *sets))]
    environment = os.environ | {"RAY_ADDRESS": address}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def _asked(dashboard: str, *words: str) -> str:
    """What `jest submit --status JOB`, or the like, answers."""
    command = [sys.executable, "-m", "pipelines", "submit", *words, "--address", dashboard]
    return subprocess.run(command, capture_output=True, text=True, check="--status" in words, timeout=100).stdout


def _learners() -> list[psutil.Process]:
    """Of the cluster here, whose nodes are this process's children: another test may have learners of its own."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def _lose_the_node_of(process: psutil.Process) -> None:
    """SIGKILL to a raylet and all that it started."""
    raylet = next(p for p in process.parents() if p.name() == "raylet")
    for each in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)


def _wait_for_a_checkpoint(directory: str, job: str, dashboard: str) -> None:
    deadline = time.monotonic() + 600
    while not checkpoints.steps(directory):
        assert submit.status(job, dashboard) == "RUNNING", _asked(dashboard, "--logs", job)
        assert time.monotonic() < deadline
        time.sleep(0.5)


def _stop_in_training(run: Run, told: list[str], dashboard: str) -> int:
    """Submit the chain and stop its job when a checkpoint is there; returns the step reached. Meanwhile the job is one
    that runs, and that no other may disturb."""
    directory = run.path(run.run_dir)
    output, _ = _submit(dashboard, CHAIN, told, "--detach").communicate(timeout=200)
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
    assert f"job {job}: STOPPED" in _asked(dashboard, "--status", job)
    with pytest.raises(RuntimeError, match=f"job {job} STOPPED"):
        submit.follow(job, dashboard)
    return checkpoints.steps(directory)[-1]


def _lose_a_node_in_training(directory: str, reached: int, job: subprocess.Popen[str]) -> list[int]:
    """Watch for a checkpoint after the step reached, in a thread, and kill a learner's node then; the step of the
    checkpoint, once that is done."""
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


def _each_part_has_done_its_work(run: Run) -> pa.Table:
    """What the run file asks of each stage; returns the selection log."""
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


def _nothing_shows_credentials(directory: str, dashboard: str, *outputs: str) -> None:
    """Whoever reads the job's log, its page or the run directory learns none."""
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
def test_laion_2b_runs_as_jobs_that_are_stopped_and_outlive_a_node(nodes: Nodes, laion: Laion, capsys):
    """One run by three jobs: stopped, refused with another learning rate, and going on while a node is lost; then its
    like without a job, undisturbed. All in one, as each job and each learner costs seconds to start."""
    dashboard, run, quiet = nodes.dashboard, laion.run("chain", *SIZES), laion.run("quiet", *SIZES)
    directory, told = run.path(run.run_dir), laion.overrides("chain", *SIZES)
    reached = _stop_in_training(run, told, dashboard)
    assert 0 < reached < run.n_steps

    failed = _submit(dashboard, ["train"], [*told, "training.learning_rate=0.5"])
    refused, _ = failed.communicate(timeout=200)
    assert failed.returncode == 1
    assert "training.learning_rate" in refused  # another learning rate is another run

    job = _submit(dashboard, CHAIN, told)
    lost = _lose_a_node_in_training(directory, reached, job)
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output
    assert lost, "the run ended before a node was lost"
    assert lost[0] < run.n_steps
    assert [stage for stage in CHAIN if stage not in re.findall(r"^([a-z-]+): ", output, re.MULTILINE)] == []
    assert output.count("already at") >= 3, output  # what the stopped job has finished

    log = _each_part_has_done_its_work(run)

    # nothing is done twice by the same stages again, and a run that nobody disturbed says the same
    capsys.readouterr()
    stages.run_stages(run, CHAIN)
    again = capsys.readouterr().out
    assert again.count("already at") >= 4, again
    other = _train(laion.overrides("quiet", *SIZES), nodes.address)
    assert log.equals(selection_log.read(quiet.path(quiet.run_dir))), other

    _nothing_shows_credentials(directory, dashboard, output, refused, again, other)

    # a Ray that is here already is left alone
    code = "import ray; from pipelines.base import cluster; cluster.connect(); print(len(ray.nodes()), 'node')"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert alone.stdout == "1 node\n"
