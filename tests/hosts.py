"""Hosts in network namespaces of this machine, with a Ray node on each."""

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

from tests.networks import Network

BIN = Path(sys.executable).parent
# a node counts as dead after five seconds without an answer; tests may set more, as a busy machine answers late
_PATIENCE = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}


class Hosts(Network):
    """Hosts with the addresses 10.213.0.10 ..., each with a Ray node. They share all files and process ids."""

    def __init__(self, folder: str, n: int) -> None:
        super().__init__("10.213.0", n)
        self.environment = os.environ | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"} | _PATIENCE

    def start(self, i: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command on host i."""
        environment = self.environment | environment
        return subprocess.Popen(
            [*self.on(i), *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def start_ray(self, i: int, n_cpus: int) -> None:
        """Start a Ray node on host i: the head on host 0."""
        started = self.start(i, *self._ray(i, n_cpus))
        output, _ = started.communicate(timeout=100)
        assert started.returncode == 0, output

    def start_pod(self, i: int, n_cpus: int) -> subprocess.Popen[str]:
        """Start a Ray node on host i as KubeRay does it in a pod: by the process that Kubernetes sends SIGTERM to."""
        command = " ".join([*self._ray(i, n_cpus), "--block"])
        return self.start(i, "/bin/bash", "-c", "--", f"ulimit -n 65536; {command}")

    def _ray(self, i: int, n_cpus: int) -> list[str]:
        role = ["--head", "--include-dashboard", "false"] if i == 0 else ["--address", f"{self.address(0)}:6379"]
        words = ["--num-cpus", str(n_cpus), "--node-ip-address", self.address(i)]
        store = ["--object-store-memory", "200000000", "--disable-usage-stats"]
        return [str(BIN / "ray"), "start", *role, *words, *store]

    def processes(self, i: int) -> list[psutil.Process]:
        pids = self.pids(i)
        return [process for process in psutil.process_iter(["cmdline"]) if process.pid in pids]

    def learners(self) -> dict[int, int]:
        """Process id of each learner -> its host."""
        return {
            process.pid: i
            for i in range(self.n_hosts)
            for process in self.processes(i)
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
        }


@contextlib.contextmanager
def opened(n: int) -> Iterator[Hosts]:
    """n hosts, which are removed in the end; skips the test where this machine cannot make them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and iproute2")
    with tempfile.TemporaryDirectory(
        prefix="ray", ignore_cleanup_errors=True
    ) as folder:  # short, as paths of sockets are limited
        try:
            hosts = Hosts(folder, n)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine lets us make no network namespaces: {error.stderr}")
        try:
            yield hosts
        finally:
            hosts.close()


def wait_until(happened: Callable[[], bool], command: subprocess.Popen[str], seconds: float = 200) -> None:
    """Wait until `happened()` is true; fail if the command ends before that, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert command.poll() is None, command.communicate()
        if time.monotonic() > deadline:
            command.kill()
            raise AssertionError(f"nothing happened for {seconds} s: {command.communicate()[0]}")
        time.sleep(0.2)
