"""Hosts on this machine that ssh reaches: network namespaces, each with its own processes and home."""

import contextlib
import fcntl
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

BIN = Path(sys.executable).parent
_BRIDGE = "jest-up"
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


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class SshHosts:
    """Hosts jest-up-0, ... at 10.214.0.10, ...: root logs in with the key `key`. They share all files but the home.

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

    def address(self, i: int) -> str:
        return f"10.214.0.{10 + i}"

    def open(self) -> None:
        """Make the namespaces, start sshd in each, and wait until it answers. Raises CalledProcessError where this
        machine does not allow it."""
        Path("/run/sshd").mkdir(exist_ok=True)
        self._remove()  # what an earlier, killed test has left
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("address", "add", "10.214.0.1/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for i in range(self.n_hosts):
            host = f"{_BRIDGE}-{i}"
            _ip("netns", "add", host)
            _ip("link", "add", f"{_BRIDGE}-p{i}", "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("link", "set", f"{_BRIDGE}-p{i}", "master", _BRIDGE, "up")
            _ip("-n", host, "address", "add", f"{self.address(i)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host, "link", "set", device, "up")
            _ip("-n", host, "route", "add", "default", "via", "10.214.0.1")  # Ray asks for the way out for its address
            self._serve(i)
        for i in range(self.n_hosts):
            self._wait(i)

    def _serve(self, i: int) -> None:
        """Start sshd on host i, in process ids and mounts of its own."""
        passwd, config = self.folder / f"passwd-{i}", self.folder / "sshd_config"
        serve = f"mount --bind {passwd} /etc/passwd && exec /usr/sbin/sshd -D -e -f {config}"
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", serve]
        with (self.folder / f"sshd-{i}.log").open("wb") as log:
            command = ["ip", "netns", "exec", f"{_BRIDGE}-{i}", *apart]
            self._servers.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))

    def _wait(self, i: int) -> None:
        deadline = time.monotonic() + 30
        while (login := self.start(i, "echo $HOME")).wait():
            log = (self.folder / f"sshd-{i}.log").read_text()
            assert time.monotonic() < deadline, f"{login.communicate()} {log}"
            time.sleep(0.1)
        assert login.communicate()[0].strip() == str(self.folder / f"home-{i}")

    def __enter__(self) -> "SshHosts":
        self._turn = os.open(f"/run/lock/{_BRIDGE}", os.O_CREAT)  # one test at a time: all use the same names
        fcntl.flock(self._turn, fcntl.LOCK_EX)
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
        for pid in map(int, _ip("netns", "pids", f"{_BRIDGE}-{i}").split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield psutil.Process(pid)

    def close(self) -> None:
        """End all processes of the hosts and remove the namespaces."""
        for server in self._servers:
            server.kill()  # and with it, by --kill-child, all that runs there
            server.wait()
        self._remove()
        os.close(self._turn)

    def _remove(self) -> None:
        for i in range(self.n_hosts):
            subprocess.run(["ip", "netns", "del", f"{_BRIDGE}-{i}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", _BRIDGE], check=False, capture_output=True)


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
