"""`ray up`, `jest submit` and `ray down` on hosts reached by ssh, with the commands of the launcher files."""

import contextlib
import os
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

import pytest
import yaml

from jest_core import run_file
from tests.conftest import MakeRun, free_port
from tests.deploy.ssh_hosts import BIN, SshHosts, ended, environment, refuse_or_skip

LAUNCHER = Path(__file__).resolve().parents[2] / "deploy/launcher"
HEAD, WORKER = 0, 1


def _variables(config: dict[str, Any]) -> str:
    """The lines of a .bashrc that set what the containers of a launcher file have in their environment."""
    options = [option.partition(" ") for option in config["docker"]["run_options"]]
    return "".join(f"export {value}\n" for name, _, value in options if name == "--env")


def _here(config: dict[str, Any], hosts: SshHosts) -> dict[str, Any]:
    """A launcher file for machines that exist and have no Docker: the same commands and files, on these hosts."""
    cloud = ("docker", "available_node_types", "head_node_type", "initialization_commands")
    config = {key: value for key, value in config.items() if key not in cloud}
    provider = {"type": "local", "head_ip": hosts.address(HEAD), "worker_ips": [hosts.address(WORKER)]}
    auth = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    return config | {"provider": provider, "auth": auth, "max_workers": 1, "cluster_name": hosts.folder.name}


class Launcher:
    """Ray's cluster launcher, called from the machine of a user who has the token."""

    def __init__(self, hosts: SshHosts, config: dict[str, Any]) -> None:
        self.home, self.file = hosts.folder / "user", hosts.folder / "cluster.yaml"
        self.home.mkdir()
        self.file.write_text(yaml.safe_dump(_here(config, hosts)))
        # With its newer autoscaler, Ray 2.60 never counts the head of provider `local` as started, so no worker follows
        self.environment = environment(self.home) | {"RAY_UP_enable_autoscaler_v2": "0"}
        self.run("get-auth-token", "--generate")

    @property
    def token(self) -> str:
        return (self.home / ".ray/auth_token").read_text()

    def run(self, *words: str) -> str:
        """The output of a command of `ray`, which has to succeed."""
        words = (BIN / "ray", *words)  # type: ignore[assignment]
        ran = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=300)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    @contextlib.contextmanager
    def dashboard(self) -> Iterator[str]:
        """The dashboard's address through `ray dashboard`."""
        port = free_port()
        command = [BIN / "ray", "dashboard", self.file, "--port", str(port), "--no-config-cache"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        forward = subprocess.Popen(command, env=self.environment, start_new_session=True, **quiet)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(lambda: _status(f"{address}/api/version") is not None)
            yield address
        finally:
            os.killpg(forward.pid, signal.SIGTERM)  # with its ssh
            forward.wait()

    def submit(self, run: Path, address: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines", "submit", "catalogue", run, "--address", address]
        environment = self.environment | environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def _status(url: str, token: str = "") -> int | None:
    """The HTTP status that an address answers with; None if nobody answers."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _wait(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"it has not happened in {seconds} s"
        time.sleep(0.5)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, as paths of Ray's sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="up", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.long
def test_rays_launcher_starts_a_cluster_that_takes_jobs_with_its_token(make_run: MakeRun, folder: Path):
    config = yaml.safe_load((LAUNCHER / "aws.yaml").read_text())  # gcp.yaml has the same commands: test_launchers.py
    with refuse_or_skip(), SshHosts(folder, 2, f"export PATH={BIN}:$PATH\n{_variables(config)}") as hosts:
        ray = Launcher(hosts, config)
        ray.run("up", "-y", "--no-config-cache", str(ray.file))
        _wait(lambda: any(p.name() == "raylet" for p in hosts.processes(WORKER)))

        for host in (HEAD, WORKER):  # the token came by file_mounts: to the head from here, to the worker from the head
            assert (folder / f"home-{host}/.ray/auth_token").read_text() == ray.token
            raylet = next(p for p in hosts.processes(host) if p.name() == "raylet")
            assert raylet.environ()["RAY_AUTH_MODE"] == "token"
            assert "OMP_NUM_THREADS" not in raylet.environ()

        run = make_run("launched")
        path = folder / "run.yaml"
        path.write_text(run_file.dump(run))
        with ray.dashboard() as address:
            assert (_status(f"{address}/api/version"), _status(f"{address}/api/version", ray.token)) == (401, 200)
            refused = ray.submit(path, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="another")
            assert refused.returncode, refused.stdout
            done = ray.submit(path, address, RAY_AUTH_MODE="token")
            assert done.returncode == 0, done.stdout + done.stderr
        assert list(Path(run.path("catalogue")).glob("*.parquet"))

        ray.run("down", "-y", str(ray.file))
        # A cloud's machines end with `ray down`; of hosts that stay, it stops the head's Ray alone
        assert ended(hosts, HEAD), list(hosts.processes(HEAD))
