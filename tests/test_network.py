"""A run on Ray nodes in network namespaces of this machine, one of which loses its network for a while."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from jest_core import run_file
from pipelines.base import checkpoints
from pipelines.training import selection_log, train

N_NODES = 3
BIN = Path(sys.executable).parent


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Network namespaces jest-0 ... with the addresses 10.213.0.10 ..., on one bridge. They share all files."""

    def __init__(self, folder: str) -> None:
        self.environment = os.environ | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        self.close()  # remove what an earlier, killed test has left

    def open(self) -> None:
        _ip("link", "add", "jest-bridge", "type", "bridge")
        _ip("link", "set", "jest-bridge", "up")
        for i in range(N_NODES):
            _ip("netns", "add", f"jest-{i}")
            _ip("link", "add", f"jest-port-{i}", "type", "veth", "peer", "name", "eth0", "netns", f"jest-{i}")
            _ip("link", "set", f"jest-port-{i}", "master", "jest-bridge", "up")
            _ip("-n", f"jest-{i}", "address", "add", f"{self.address(i)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", f"jest-{i}", "link", "set", device, "up")

    def address(self, i: int) -> str:
        return f"10.213.0.{10 + i}"

    def start(self, i: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command on host i."""
        words = ["ip", "netns", "exec", f"jest-{i}", *command]
        environment = self.environment | environment
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def link(self, i: int, state: str) -> None:
        """Set the network link of host i; state: up or down."""
        _ip("link", "set", f"jest-port-{i}", state)

    def processes(self, i: int) -> list[psutil.Process]:
        pids = set(map(int, _ip("netns", "pids", f"jest-{i}").split()))
        return [process for process in psutil.process_iter(["cmdline"]) if process.pid in pids]

    def close(self) -> None:
        """Remove the namespaces that exist, and kill the processes in them."""
        there = [i for i in range(N_NODES) if f"jest-{i}" in _ip("netns", "list").split()]
        running = [process for i in there for process in self.processes(i)]
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(running, timeout=10)
        for i in there:
            _ip("netns", "del", f"jest-{i}")
        subprocess.run(["ip", "link", "del", "jest-bridge"], check=False, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and iproute2")
    with tempfile.TemporaryDirectory(
        prefix="ray", ignore_cleanup_errors=True
    ) as folder:  # short, as paths of sockets are limited
        hosts = Hosts(folder)
        try:
            hosts.open()
            yield hosts
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine lets us make no network namespaces: {error.stderr}")
        finally:
            hosts.close()


def _start_ray(hosts: Hosts) -> str:
    """A head without CPUs and two nodes with three each; a node counts as dead after five seconds without an answer."""
    ray, store = str(BIN / "ray"), ["--object-store-memory", "200000000", "--disable-usage-stats"]
    patience = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
    address = f"{hosts.address(0)}:6379"

    for i in range(N_NODES):
        role = ["--address", address, "--num-cpus", "3"] if i else ["--head", "--num-cpus", "0"]
        role += ["--node-ip-address", hosts.address(i)] + ["--include-dashboard", "false"] * (i == 0)
        started = hosts.start(i, ray, "start", *role, *store, **patience)
        output, _ = started.communicate(timeout=100)
        assert started.returncode == 0, output
    return address


def _learners(hosts: Hosts) -> dict[int, int]:
    """Process id of each learner -> its host."""
    return {
        process.pid: i
        for i in range(1, N_NODES)
        for process in hosts.processes(i)
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
    }


def _wait_until(happened: Callable[[], bool], train: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert train.poll() is None, train.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_survives_a_node_cut_off_from_the_network(make_scored_run, tmp_path, hosts: Hosts):
    address = _start_ray(hosts)
    sizes = ["training.n_learners=2", "training.examples_trained=1280", "training.checkpoint_every_steps=5"]
    (tmp_path / "cut.yaml").write_text(run_file.dump(make_scored_run("cut", *sizes)))
    command = [sys.executable, "-m", "pipelines", "train", str(tmp_path / "cut.yaml")]
    cut = hosts.start(0, *command, RAY_ADDRESS=address)
    _wait_until(lambda: len(_learners(hosts)) == 2, cut)
    before = _learners(hosts)
    _wait_until(lambda: bool(checkpoints.steps(str(tmp_path / "cut"))), cut)
    host = next(iter(before.values()))
    hosts.link(host, "down")
    # Ray Train restarts the learner on another node
    _wait_until(lambda: any(pid not in before for pid in _learners(hosts)), cut)
    hosts.link(host, "up")  # learners on the node that was cut off may still run, and write to the same files
    output, _ = cut.communicate(timeout=300)
    assert cut.returncode == 0, output

    train.run_stage(make_scored_run("undisturbed", *sizes))  # on the Ray of ray_session, whose network is not cut
    log = selection_log.read(str(tmp_path / "cut"))
    assert log.equals(selection_log.read(str(tmp_path / "undisturbed")))
