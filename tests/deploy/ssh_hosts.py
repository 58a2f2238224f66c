"""Hosts on this machine that ssh reaches: network namespaces, each with its own processes and home."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.networks import Network

BIN = Path(sys.executable).parent
_QUIET = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
_SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""


class SshHosts:
    """Hosts at 10.214.0.10, ...: root logs in with the key `key`. They share all files but the home.

    A host has its own process ids, so that `ray stop` ends the Ray of this host, and no other one of this machine.
    """

    def __init__(self, folder: Path, n_hosts: int, bashrc: str) -> None:
        self.folder, self.n_hosts, self.key = folder, n_hosts, folder / "key"
        self._servers: list[subprocess.Popen[bytes]] = []
        for name in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        (folder / "sshd_config").write_text(_SSHD.format(folder=folder))
        for i in range(n_hosts):
            home = folder / f"home-{i}"
            home.mkdir()
            (home / ".bashrc").write_text(bashrc + f"export RAY_TMPDIR={home}\n")
            passwd = Path("/etc/passwd").read_text().replace(":/root:", f":{home}:", 1)
            (folder / f"passwd-{i}").write_text(passwd)

    def open(self) -> None:
        """Start sshd on each host, and wait until it answers."""
        Path("/run/sshd").mkdir(exist_ok=True)
        for i in range(self.n_hosts):
            self._serve(i)
        for i in range(self.n_hosts):
            self._wait(i)

    def address(self, i: int) -> str:
        return self._network.address(i)

    def _serve(self, i: int) -> None:
        """Start sshd on host i, in process ids and mounts of its own."""
        passwd, config = self.folder / f"passwd-{i}", self.folder / "sshd_config"
        serve = f"mount --bind {passwd} /etc/passwd && exec /usr/sbin/sshd -D -e -f {config}"
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", serve]
        with (self.folder / f"sshd-{i}.log").open("wb") as log:
            command = [*self._network.on(i), *apart]
            self._servers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def _wait(self, i: int) -> None:
        deadline = time.monotonic() + 30
        while True:
            login = self.start(i, "echo $HOME")
            answer = login.communicate()[0].strip()
            if login.returncode == 0:
                break
            log = (self.folder / f"sshd-{i}.log").read_text()
            assert time.monotonic() < deadline, f"{answer} {log}"
            time.sleep(0.1)
        assert answer == str(self.folder / f"home-{i}")

    def __enter__(self) -> "SshHosts":
        self._network = Network("10.214.0", self.n_hosts, with_this_machine=True)
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, i: int, commands: str) -> subprocess.Popen[str]:
        """Start commands of bash on host i, by ssh."""
        return subprocess.Popen(
            ["ssh", "-i", self.key, *_QUIET, f"root@{self.address(i)}", f"bash -c {shlex.quote(commands)}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self, i: int) -> Iterator[psutil.Process]:
        """All processes of host i, sshd included."""
        for pid in self._network.pids(i):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield psutil.Process(pid)

    def close(self) -> None:
        """End all processes of the hosts and remove the namespaces."""
        for server in self._servers:
            server.kill()  # and with it, by --kill-child, all that runs there
            server.wait()
        self._network.close()


def ended(hosts: SshHosts, i: int) -> bool:
    """Whether no process of Ray is left on host i."""
    return not [p for p in hosts.processes(i) if p.name() in ("raylet", "gcs_server", "python", "ray")]


@contextlib.contextmanager
def refuse_or_skip() -> Iterator[None]:
    """Skip a test on a machine that has not what SshHosts needs; in CI it fails there."""
    if not os.environ.get("CI") and (os.geteuid() or not all(map(shutil.which, ("ip", "sshd", "rsync")))):
        pytest.skip("needs root, iproute2, openssh-server and rsync")
    try:
        yield
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"this machine lets us make no network namespaces: {error.stderr}")


def environment(home: Path) -> dict[str, str]:
    """The environment of commands of a user whose home is this folder, and who has no Ray running."""
    left_out = ("RAY_", "SSH_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"HOME": str(home), "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
