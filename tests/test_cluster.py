"""A cluster of several nodes on this machine: the whole chain by the job API, on S3, while a node is lost."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jest_core import config as run_files
from jest_core.config import Run
from pipelines import checkpoints, selection_log, storage, submit
from tests.conftest import POOL, RUN, free_port
from tests.pipelines.test_reference_scores import make_reference
from tests.websites import Website

SETTINGS = """{urls: "laion/*.parquet", shards: fetched, rows_per_shard: 100, image_size: 64, private_addresses: true,
 n_tasks: 2, threads: 16, resize_mode: no, rules: [{rule: nsfw}]}"""
CHAIN = ["ingest", "catalogue", "reference-scores", "train", "evaluate", "report"]


@pytest.fixture(scope="module")
def dashboard(s3: str) -> Iterator[str]:
    """Of a head without CPUs and two nodes with four each; after the S3 server, whose address its workers inherit."""
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
        cluster.add_node(**node(4))
    yield f"http://127.0.0.1:{port}"
    cluster.shutdown()


@pytest.fixture(scope="module")
def laion(s3: str) -> Iterator[Callable[..., Run]]:
    """laion("run", "training.n_learners=2"): a run over pictures of LAION's metadata, which a web server here has."""
    rows = [row for row in pq.read_table(POOL / "00000.parquet").slice(0, 400).to_pylist() if row["webp"]]
    website, root = Website([row["webp"] for row in rows]), f"{s3}/cluster"
    metadata = [
        {
            "SAMPLE_ID": i,
            "URL": f"{website.address}/ok/{i}",
            "TEXT": row["caption"],
            "NSFW": "NSFW" if i < 3 else "UNLIKELY",
            "similarity": 0.3,
        }
        for i, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(metadata), sink := io.BytesIO())
    storage.write_bytes(f"{root}/laion/part-00000.parquet", sink.getvalue())
    sets = "{sets: [{name: own, shards: 'fetched/*.tar', tasks: [retrieval]}]}"

    def make(name: str, *overrides: str) -> Run:
        text = RUN.format(root=root, name=name, shards="fetched").replace("fetched/*.parquet", "fetched/*.tar")
        return run_files.load(text, [f"ingest={SETTINGS}", f"evaluation={sets}", *overrides])

    make_reference(make("any"))
    yield make
    website.close()


def _submit(tmp_path, run: Run, dashboard: str, *words: str) -> subprocess.Popen[str]:
    """`jest submit` as a user calls it."""
    (tmp_path / "run.yaml").write_text(run_files.dump(run))
    command = [sys.executable, "-m", "pipelines", "submit", *words, "--address", dashboard]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _learners() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


def _lose_the_node_of(process: psutil.Process) -> None:
    """SIGKILL to a raylet and all that it started."""
    raylet = next(p for p in process.parents() if p.name() == "raylet")
    for each in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_chain_runs_as_one_job_and_outlives_a_node(tmp_path, dashboard: str, laion):
    steps = ["training.n_learners=2", "training.examples_trained=3200", "training.checkpoint_every_steps=10"]
    run, quiet = laion("chain", *steps), laion("quiet", *steps)
    directory = run.path("chain")
    job = _submit(tmp_path, run, dashboard, *CHAIN, str(tmp_path / "run.yaml"))
    lost = []

    def lose() -> None:
        while job.poll() is None and not lost:
            if checkpoints.steps(directory) and (learners := _learners()):
                _lose_the_node_of(learners[0])
                lost.append(checkpoints.steps(directory)[-1])
            time.sleep(0.2)

    threading.Thread(target=lose, daemon=True).start()
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output
    assert lost, "the run ended before a node was lost"
    assert lost[0] < run.n_steps
    told = re.findall(r"^([a-z-]+): ", output, re.MULTILINE)
    assert [stage for stage in CHAIN if stage not in told] == []
    assert storage.exists(f"{directory}/report.html")

    # nothing is done twice by the same submission again, and a run that no node left says the same
    again, _ = _submit(tmp_path, run, dashboard, *CHAIN, str(tmp_path / "run.yaml")).communicate(timeout=300)
    assert again.count("already at") >= 4, again
    other, _ = _submit(tmp_path, quiet, dashboard, "train", str(tmp_path / "run.yaml")).communicate(timeout=300)
    assert selection_log.read(directory).equals(selection_log.read(quiet.path("quiet"))), other

    # whoever reads the job's log, its page or the run directory learns no credentials
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    with urllib.request.urlopen(f"{dashboard}/api/jobs/", timeout=30) as answer:
        jobs = answer.read().decode()
    assert len(json.loads(jobs)) >= 3
    written = [
        storage.read_bytes(f"{directory}/{name}").decode() for name in ("run.yaml", "report.html", "manifest.json")
    ]
    assert secret
    assert not [text for text in (output, again, other, jobs, *written) if secret in text]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_job_is_followed_and_stopped_and_its_failure_is_the_commands(tmp_path, dashboard: str, laion):
    run = laion("stopped", "training.examples_trained=64000", "training.checkpoint_every_steps=5")
    run_file = str(tmp_path / "run.yaml")
    chain = [*CHAIN[:3], "train", run_file]
    output, _ = _submit(tmp_path, run, dashboard, *chain, "--detach").communicate(timeout=100)
    job = re.search(r"job (raysubmit_\w+)", output)[1]
    deadline = time.monotonic() + 300
    while not checkpoints.steps(run.path("stopped")):
        assert time.monotonic() < deadline, _submit(tmp_path, run, dashboard, "--logs", job).communicate(timeout=60)
        time.sleep(0.5)
    assert submit.status(job, dashboard) == "RUNNING"
    with pytest.raises(ValueError, match=f"job {job} works on"):
        submit.run_stage(run, ["train"], dashboard, {})
    submit.stop(job, dashboard)
    assert submit.status(job, dashboard) == "STOPPED"
    with pytest.raises(RuntimeError, match=f"job {job} STOPPED"):
        submit.follow(job, dashboard)
    reached = checkpoints.steps(run.path("stopped"))[-1]
    shorter = laion("stopped", f"training.examples_trained={32 * (reached + 5)}", "training.checkpoint_every_steps=5")
    failed = _submit(tmp_path, shorter, dashboard, "train", run_file)
    told, _ = failed.communicate(timeout=200)
    assert failed.returncode == 1
    assert "training.examples_trained" in told  # another budget is another run


def test_what_cannot_be_submitted_is_told_at_once(make_run):
    run = make_run("joint")
    with pytest.raises(ValueError, match="evaluates: no stage; there are ingest catalogue"):
        submit.run_stage(run, ["evaluates"], "http://127.0.0.1:1", {})
    with pytest.raises(ValueError, match=r"--env AWS_SECRET_ACCESS_KEY: .* credentials belong into the environment"):
        submit.run_stage(run, ["train"], "http://127.0.0.1:1", {"AWS_SECRET_ACCESS_KEY": "x"})
    with pytest.raises(ConnectionError):
        submit.run_stage(run, ["train"], "http://127.0.0.1:1", {"WANDB_MODE": "offline"})
