"""Shared fixtures: one local Ray for the session, four small shards of real drawings, tiny towers."""

import os
from pathlib import Path

os.environ.update(
    {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # Ray's workers are niced by default, and tests wait for them
        # more idle workers than this are stopped: those that have loaded a model keep half a gigabyte each
        "RAY_num_workers_soft_limit": "8" if "PYTEST_XDIST_WORKER" in os.environ else "16",
        "RAY_metrics_report_interval_ms": "2000",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "AWS_EC2_METADATA_DISABLED": "true",  # botocore asks it for credentials, and nothing answers
        "OMP_NUM_THREADS": "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS", "2"),
        "TRITON_INTERPRET": "0" if Path("/dev/nvidia0").exists() else "1",  # before Triton's first import
    }
)

import contextlib
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from importlib.resources import files
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import cluster

N_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # of pytest-xdist; they share this machine
POOL = Path(str(files("jest_deploy") / "data" / "small" / "pool"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _share_of_the_cores() -> Iterator[None]:
    """Give each worker of pytest-xdist its share of the cores: more threads than cores slow each other down."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    share = max(1, cluster.n_cores() // N_WORKERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "n_cores", lambda: share)
        yield


@pytest.fixture(scope="session", autouse=True)
def _orphans_end_by_themselves() -> Iterator[None]:
    from tests.commands import orphans

    yield
    assert not orphans(seconds=90)


_N_CORES = cluster.n_cores


@pytest.fixture
def all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process on as many threads as a separate command would, so that sums are rounded alike."""
    monkeypatch.setattr(cluster, "n_cores", _N_CORES)


# A test is fast unless it is marked otherwise or uses one of these, as a fixture or as the value of a parameter
SERVICES = {"ray_session", "s3_server", "s3"}
NOT_FAST = {"slow", "long", "chaos", "endurance"}
MAX_SLEEP_SECONDS = 0.3  # the longest single sleep in a fast test, which may poll for another thread


def is_fast(item: pytest.Function) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    used = {*item.fixturenames, *(value for value in parameters if isinstance(value, str))}
    return not (used & SERVICES or NOT_FAST & {mark.name for mark in item.iter_markers()})


@pytest.hookimpl(tryfirst=True)  # before -m filters by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and is_fast(item):
            item.add_marker(pytest.mark.fast)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """No bytes in the name of a test: gzip's have the time in them, and processes would not collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, pytest.TestReport, Any]:
    """With JEST_NO_SKIPS=1, as in .ci/run, a test may be skipped for want of a GPU, and for nothing else."""
    report = yield
    if report.skipped and os.environ.get("JEST_NO_SKIPS") == "1" and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr)
        if not re.search("GPU|CUDA", reason):
            report.outcome, report.longrepr = "failed", f"skipped, which JEST_NO_SKIPS=1 forbids: {reason}"
    return report


@pytest.fixture(autouse=True)
def _only_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make a fast test fail if it starts Ray (here or in a subprocess) or the S3 server, or if it sleeps."""
    if request.node.get_closest_marker("fast") is None:
        yield
        return
    # Ray first creates its session folder: below a file that fails, and the error shows this path
    monkeypatch.setenv("RAY_TMPDIR", f"{__file__}/a test that starts Ray is not fast: use the fixture ray_session")
    monkeypatch.setattr(S3Server, "start", _refuse_s3)
    slept, sleep = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds))[1])
    yield
    longest = max(slept, default=0.0)
    assert longest <= MAX_SLEEP_SECONDS, f"a fast test slept {longest} s: mark it slow, or let it wait for less"


def _refuse_s3(server: "S3Server") -> None:
    raise RuntimeError("a test that starts the S3 server is not fast: use the fixture s3")


@pytest.fixture(scope="session")
def ray_session(s3: str) -> Iterator[None]:
    """One local Ray for all tests that need it; started after the S3 server, whose address its workers inherit."""
    os.environ.pop("RAY_ADDRESS", None)
    cluster.connect()
    yield
    cluster.disconnect()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 150 rows of the committed pool, in row groups of 50."""
    folder = tmp_path_factory.mktemp("shards")
    table = pq.read_table(POOL / "00000.parquet")
    for i in range(4):
        pq.write_table(table.slice(150 * i, 150), folder / f"{i:05d}.parquet", row_group_size=50)
    return folder


RUN = """
root: {root}
run_dir: {name}
seed: 0
data:
  shards: "{shards}/*.parquet"
  catalogue: catalogue
  rules: [{{rule: status}}, {{rule: caption, min_words: 1, min_characters: 2}}]
  n_streams: 4
  window_rows: 100
model: {{name: jest-tiny}}
reference:
  model: {{name: jest-tiny}}
  checkpoint: reference
  scores: scores
selection: {{method: joint, filter_ratio: 0.5, n_chunks: 4}}
training:
  sub_batch_size: 32
  examples_trained: 192
  learning_rate: 1.0e-3
  warmup_steps: 2
  weight_decay: 0.1
  checkpoint_every_steps: 2
  max_failures: 2
"""

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path, shards: Path) -> MakeRun:
    """make_run("joint", "selection.n_chunks=2", root=...): a run over the small shards."""

    def make(name: str, *overrides: str, root: str | None = None, source: str | None = None) -> Run:
        text = RUN.format(root=root or tmp_path, name=name, shards=source or shards)
        return run_file.load(text, list(overrides))

    return make


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory, shards: Path, ray_session: None) -> Run:
    """A run over the small shards with a finished catalogue and score cache, which tests must not change."""
    from jest_core.models import towers
    from pipelines.base import checkpoints
    from pipelines.data import catalogue
    from pipelines.scores import reference_scores

    run = run_file.load(RUN.format(root=tmp_path_factory.mktemp("scored"), name="joint", shards=shards))
    model = towers.create("jest-tiny", seed=5).model
    checkpoints.write(run.path("reference"), 1, {"epoch": 1, "state_dict": model.state_dict(), "jest": {"step": 1}})
    catalogue.run_stage(run)
    reference_scores.run_stage(run)
    return run


@pytest.fixture
def make_scored_run(scored: Run, make_run: MakeRun, tmp_path: Path) -> MakeRun:
    """make_run over a copy of the files of `scored`."""
    shutil.copytree(scored.root, tmp_path, dirs_exist_ok=True)
    return make_run


# The ports of this pytest process. Each is used once: a port that is still free may be meant for another server
_FIRST = 20_000 + 1_500 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8)
_PORTS = random.SystemRandom().sample(range(_FIRST, _FIRST + 1_500), 1_500)


def free_port() -> int:
    """A free port above those of Ray's workers and below Linux's ephemeral ports, either of which could occupy the port
    of a server that has not started yet, or that a test has stopped for a while."""
    while True:
        port = _PORTS.pop()
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class S3Server:
    """A real S3 server (SeaweedFS) with the bucket `jest`, which can be killed and started again on its data."""

    def __init__(self, folder: Path) -> None:
        services = ("s3", "master", "volume", "filer")
        names = [name for service in services for name in (f"{service}.port", f"{service}.port.grpc")]
        ports = {name: free_port() for name in [*names, "admin.port", "admin.port.grpc"]}
        self.url = f"http://127.0.0.1:{ports['s3.port']}"
        self.command = [
            shutil.which("weed") or str(Path(sys.executable).parent / "weed"),
            "mini",
            f"-dir={folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in ports.items()),
            *("-admin.ui=false", "-webdav=false", "-master.telemetry=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-bucket=jest"),
        ]

    def start(self) -> None:
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, env={**os.environ, "GOMEMLIMIT": "512MiB"}, **silent)
        _wait_until_it_stores("s3://jest", self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The S3 server; started before Ray, whose workers inherit its address and credentials."""
    server = S3Server(tmp_path_factory.mktemp("weed"))
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys | {"AWS_ENDPOINT_URL": server.url})
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def s3(s3_server: S3Server) -> str:
    return "s3://jest"


def _wait_until_it_stores(bucket: str, server: subprocess.Popen[bytes]) -> None:
    from pipelines.base import storage

    deadline = time.monotonic() + 60
    while True:
        try:
            storage.write_bytes(f"{bucket}/ready", b"1")  # the server lists before it can store
            return
        except Exception:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.3)
