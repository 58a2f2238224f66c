"""A network of this machine: hosts in network namespaces, on one bridge."""

import contextlib
import fcntl
import os
import re
import subprocess

import psutil


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Network:
    """Hosts 0, 1 ... with the addresses {subnet}.10, {subnet}.11 ...; they share files and process ids.

    Tests of several processes each have networks of their own. Where this machine takes part, as {subnet}.1, only one
    of them has this subnet at a time: a second Network waits for the first one's close.

    Raises subprocess.CalledProcessError where this machine lets us make none.
    """

    def __init__(self, subnet: str, n_hosts: int = 0, *, with_this_machine: bool = False) -> None:
        self.subnet, self.n_hosts, self._prefix = subnet, 0, f"jest{os.getpid()}"
        self._turn = os.open(f"/run/lock/jest-{subnet}", os.O_CREAT)
        if with_this_machine:
            fcntl.flock(self._turn, fcntl.LOCK_EX)
        self._gateway = f"{subnet}.1" if with_this_machine else None
        _remove_left()
        try:
            self._bridge()
            for _ in range(n_hosts):
                self.add()
        except subprocess.CalledProcessError:
            self.close()
            raise

    def _bridge(self) -> None:
        bridge = f"{self._prefix}-b"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        if self._gateway:
            _ip("address", "add", f"{self._gateway}/24", "dev", bridge)

    def add(self) -> int:
        """Make one more host, and return its number."""
        i = self.n_hosts
        self.n_hosts += 1
        host, port = self._host(i), self._port(i)
        _ip("netns", "add", host)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
        _ip("link", "set", port, "master", f"{self._prefix}-b", "up")
        _ip("-n", host, "address", "add", f"{self.address(i)}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", host, "link", "set", device, "up")
        if self._gateway:  # Ray asks for the way out for its address
            _ip("-n", host, "route", "add", "default", "via", self._gateway)
        return i

    def _host(self, i: int) -> str:
        return f"{self._prefix}-{i}"

    def _port(self, i: int) -> str:
        return f"{self._prefix}p{i}"

    def address(self, i: int) -> str:
        return f"{self.subnet}.{10 + i}"

    def on(self, i: int) -> list[str]:
        """The words before a command that make it run on host i."""
        return ["ip", "netns", "exec", self._host(i)]

    def link(self, i: int, state: str) -> None:
        """Set the network link of host i; state: up or down."""
        _ip("link", "set", self._port(i), state)

    def pids(self, i: int) -> set[int]:
        """The processes of host i."""
        return set(map(int, _ip("netns", "pids", self._host(i)).split()))

    def kill(self, i: int) -> None:
        """SIGKILL all processes of host i, as when the machine is lost."""
        _kill(self._host(i))

    def close(self) -> None:
        """End all processes of the hosts, and remove what was made."""
        _remove(self._prefix)
        os.close(self._turn)


def _kill(host: str) -> None:
    processes = []
    for pid in map(int, _ip("netns", "pids", host).split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
            processes[-1].kill()
    psutil.wait_procs(processes, timeout=10)


def _names() -> tuple[list[str], list[str]]:
    """The namespaces and the links of this machine."""
    hosts = [line.split()[0] for line in _ip("netns", "list").splitlines() if line]
    links = [re.split("[:@]", line)[1].strip() for line in _ip("-o", "link").splitlines()]
    return hosts, links


def _remove(prefix: str) -> None:
    """Remove the networks of a process, and end what runs on their hosts. The links go first: the kernel removes those
    of a namespace some time after the namespace, and their names are taken until then."""
    hosts, links = _names()
    for link in [link for link in links if re.fullmatch(rf"{prefix}(-b|p\d+)", link)]:
        subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)
    for host in [host for host in hosts if re.fullmatch(rf"{prefix}-\d+", host)]:
        _kill(host)
        _ip("netns", "del", host)


def _remove_left() -> None:
    """Remove what tests of processes that were killed have left."""
    hosts, links = _names()
    for name in hosts + links:
        ours = re.match(r"(jest(\d+))[-p]", name)
        if ours and not psutil.pid_exists(int(ours[2])):
            _remove(ours[1])
