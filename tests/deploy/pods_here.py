"""Pods of a manifest as processes of this machine: Ray as KubeRay starts it, each pod with a network, processes and a
/tmp/ray of its own, and the first of its processes as process 1."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.networks import Network

from .kuberay import ray_container, start_command

BIN = Path(sys.executable).parent
# What a pod's first process is preceded by: an empty volume at /tmp/ray
_CONTAINER = 'mount -t tmpfs tmpfs /tmp/ray && exec "$@"'


def can_run() -> bool:
    return os.geteuid() == 0 and bool(shutil.which("ip") and shutil.which("unshare") and shutil.which("nsenter"))


class Pods:
    """Pods by name, on one bridge, with the addresses 10.215.0.10 ...; the host is 10.215.0.1."""

    def __init__(self, logs: Path, token: str, overrides: dict[str, dict[str, str]]) -> None:
        """overrides: of each pod, the parameters of `ray start` that this machine is too small for."""
        self.logs, self.token, self.overrides = logs, token, overrides
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        Path("/tmp/ray").mkdir(exist_ok=True)
        self._network = Network("10.215.0", with_this_machine=True)

    def address(self, name: str) -> str:
        return self._network.address(self._number(name))

    def _number(self, name: str) -> int:
        return list(self.running).index(name)

    def _head(self) -> str:
        return f"{self._network.address(0)}:6379"

    def environment(self, group: dict[str, Any]) -> dict[str, str]:
        """What the operator gives a container, the token and the manifest's own."""
        own = {e["name"]: e["value"] for e in ray_container(group).get("env", [])}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        path = {"PATH": f"{BIN}:/usr/bin:/bin:/usr/sbin", "HOME": str(self.logs), "RAY_ADDRESS": self._head()}
        return path | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd()} | token | own

    def start(self, name: str, group: dict[str, Any]) -> None:
        """Start a pod of this group; the first is the head. What waits for the head comes before, as in Kubernetes."""
        self.running[name] = self._begin(self._network.add(), name, group)

    def restart_if_ended(self, name: str, group: dict[str, Any]) -> None:
        """As KubeRay does. `ray start` gives up after 30 s, which is short on a busy machine."""
        if self.running[name].poll() is not None:
            self.running[name] = self._begin(self._number(name), name, group)

    def _begin(self, i: int, name: str, group: dict[str, Any]) -> subprocess.Popen[bytes]:
        group = group | {"rayStartParams": group["rayStartParams"] | self.overrides.get(name, {})}
        isolated = [*self._network.on(i), "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        container = [
            "sh",
            "-c",
            _CONTAINER,
            "sh",
            "/bin/bash",
            "-c",
            "--",
            start_command(group, self._head() if i else None),
        ]
        with (self.logs / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [*isolated, *container],
                env=self.environment(group),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def first_process(self, name: str) -> psutil.Process:
        """Process 1 of a pod, as seen from here."""
        (first,) = psutil.Process(self.running[name].pid).children()
        return first

    def run(
        self, name: str, group: dict[str, Any], *command: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a pod, as a hook or `kubectl exec` does."""
        variables, words = self.environment(group) | environment, [*self._enter(name), *command]
        return subprocess.run(words, env=variables, capture_output=True, text=True, check=False, timeout=120)

    def start_in(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a further process in a pod."""
        return subprocess.Popen([*self._enter(name), *command], stderr=subprocess.DEVNULL)

    def _enter(self, name: str) -> list[str]:
        return ["nsenter", "--target", str(self.first_process(name).pid), "--net", "--pid", "--mount"]

    def delete(self, name: str, grace_seconds: float) -> float:
        """End a pod as the kubelet does: SIGTERM to process 1; seconds until it ended, of which there must be fewer."""
        started, process = time.monotonic(), self.running[name]
        self.first_process(name).send_signal(signal.SIGTERM)
        process.wait(grace_seconds)
        return time.monotonic() - started

    def close(self) -> None:
        for process in self.running.values():
            with contextlib.suppress(psutil.Error, IndexError):
                psutil.Process(process.pid).children()[0].kill()
            process.kill()
            process.wait(20)
        self._network.close()


@contextlib.contextmanager
def pods_here(token: str, overrides: dict[str, dict[str, str]]) -> Iterator[Pods]:
    with tempfile.TemporaryDirectory(prefix="jestk", ignore_cleanup_errors=True) as folder:
        pods = Pods(Path(folder), token, overrides)
        try:
            yield pods
        finally:
            pods.close()


def get(url: str, token: str | None = None) -> tuple[int, str]:
    """Status and body that a URL answers; 0 where nobody does."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def wait_for(happened: Callable[[], Any], seconds: float, what: Callable[[], str]) -> None:
    """Poll until it is true; what: said where it never is."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)
