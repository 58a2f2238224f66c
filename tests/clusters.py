"""A Ray cluster of several nodes on this machine, each a process group of its own that can be killed by itself."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import psutil


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Cluster:
    """A head without CPUs and workers with some; dashboard: the address of the job API."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.port, self.nodes = folder, free_port(), []
        folder.mkdir(parents=True, exist_ok=True)
        dashboard = free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"} | env
        self.env.pop("RAY_ADDRESS", None)
        self._start("--head", f"--port={self.port}", f"--dashboard-port={dashboard}", "--num-cpus=0")
        self._wait(dashboard)

    def add(self, n_cpus: int) -> subprocess.Popen[bytes]:
        address = f"{self._host()}:{self.port}"
        return self._start(f"--address={address}", f"--num-cpus={n_cpus}", "--object-store-memory=200000000")

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Every process of a node at once, as when its machine is lost."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        node.wait()
        self.nodes.remove(node)

    def close(self) -> None:
        for node in reversed(self.nodes.copy()):
            self.kill(node)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / f"node-{len(self.nodes)}.log", "wb")  # noqa: SIM115
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
        node = subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.nodes.append(node)
        return node

    def _host(self) -> str:
        with urllib.request.urlopen(f"{self.dashboard}/nodes?view=hostNameList", timeout=10):
            return socket.gethostbyname(socket.gethostname())

    def _wait(self, port: int) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with contextlib.suppress(URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2).close()
                return
            time.sleep(0.5)
        raise TimeoutError(f"no dashboard: {(self.folder / 'node-0.log').read_text()[-2000:]}")
