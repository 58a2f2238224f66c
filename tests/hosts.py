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

BIN = Path(sys.executable).parent
# a node counts as dead after five seconds without an answer; tests may set more, as a busy machine answers late
_PATIENCE = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Hosts 0, 1 ... with the addresses 10.213.0.10 ..., on one bridge. They share all files and process ids."""

    def __init__(self, folder: str, n: int) -> None:
        self.environment = os.environ | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"} | _PATIENCE
        self._prefix, self.n = f"jest{os.getpid()}", n  # tests of several processes each have hosts of their own
        _remove_left()

    def open(self) -> None:
        bridge = f"{self._prefix}-b"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for i in range(self.n):
            name, port = self._name(i), self._port(i)
            _ip("netns", "add", name)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", port, "master", bridge, "up")
            _ip("-n", name, "address", "add", f"{self.address(i)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")

    def _name(self, i: int) -> str:
        return f"{self._prefix}-{i}"

    def _port(self, i: int) -> str:
        return f"{self._prefix}p{i}"

    def address(self, i: int) -> str:
        return f"10.213.0.{10 + i}"

    def start(self, i: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command on host i."""
        words = ["ip", "netns", "exec", self._name(i), *command]
        environment = self.environment | environment
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

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

    def link(self, i: int, state: str) -> None:
        """Set the network link of host i; state: up or down."""
        _ip("link", "set", self._port(i), state)

    def processes(self, i: int) -> list[psutil.Process]:
        pids = set(map(int, _ip("netns", "pids", self._name(i)).split()))
        return [process for process in psutil.process_iter(["cmdline"]) if process.pid in pids]

    def learners(self) -> dict[int, int]:
        """Process id of each learner -> its host."""
        return {
            process.pid: i
            for i in range(self.n)
            for process in self.processes(i)
            if "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
        }

    def kill(self, i: int) -> None:
        """SIGKILL all processes of host i, as when the machine is lost."""
        _kill(self.processes(i))

    def close(self) -> None:
        _remove(self._prefix)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _remove(prefix: str) -> None:
    """Remove the namespaces of a process, and kill the processes in them."""
    for name in [each for each in _namespaces() if each.startswith(f"{prefix}-")]:
        _kill([psutil.Process(int(pid)) for pid in _ip("netns", "pids", name).split() if psutil.pid_exists(int(pid))])
        _ip("netns", "del", name)
    subprocess.run(["ip", "link", "del", f"{prefix}-b"], check=False, capture_output=True)


def _remove_left() -> None:
    """Remove what tests of processes that were killed have left."""
    for prefix in {name.partition("-")[0] for name in _namespaces()}:
        pid = prefix.removeprefix("jest")
        if prefix.startswith("jest") and pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(prefix)


@contextlib.contextmanager
def opened(n: int) -> Iterator[Hosts]:
    """n hosts, which are removed in the end; skips the test where this machine cannot make them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root, and iproute2")
    with tempfile.TemporaryDirectory(
        prefix="ray", ignore_cleanup_errors=True
    ) as folder:  # short, as paths of sockets are limited
        hosts = Hosts(folder, n)
        try:
            hosts.open()
        except subprocess.CalledProcessError as error:
            hosts.close()
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
