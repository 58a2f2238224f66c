"""The head node of a real Ray cluster on this machine, started by `ray start` and ended with all of its processes."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import free_port


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str


@contextlib.contextmanager
def started(folder: Path, *words: str, n_cpus: int = 3, **environment: str) -> Iterator[Head]:
    """A head with its home directory and files in the folder. words: further options of `ray start`."""
    port, dashboard = free_port(), free_port()
    temporary = Path("/tmp") / f"jest-head-{os.getpid()}-{port}"  # short, as the paths of sockets have to be
    command = [
        str(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block", f"--num-cpus={n_cpus}", f"--port={port}", f"--temp-dir={temporary}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"),
        *(f"--ray-client-server-port={free_port()}", "--object-store-memory=200000000", *words),
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_A", "AWS_"))}
    kept |= {"HOME": str(folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=kept | environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        deadline = time.monotonic() + 300
        while "Ray runtime started" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
    finally:
        _end(process)
        subprocess.run(["rm", "-rf", str(temporary)], check=False)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, which `ray start --block` hands on; then SIGKILL for what is left."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        for each in psutil.wait_procs([psutil.Process(process.pid), *children], timeout=15)[1]:
            each.kill()
    process.wait()
