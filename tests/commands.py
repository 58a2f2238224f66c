"""`jest` as a command of its own: started, waited for by what it has written, killed, and looked for afterwards."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import checkpoints
from pipelines.training import selection_log

_MARK = "JEST_TEST_MARK"  # an environment variable, which all that a command starts inherits
_OUTLIVE: list[psutil.Process] = []  # a command that SIGKILL ended: Ray's processes notice, the last after a minute


def write(run: Run, folder: Path) -> Path:
    """The run file of a run."""
    path = folder / f"{run.run_dir.replace('/', '-')}.yaml"
    path.write_text(run_file.dump(run))
    return path


def command(stage: str, run_file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", stage, str(run_file), *more]


class Command:
    """A command under way, its output in a file; a context manager, after which nothing of it is left, or it fails;
    of a command that SIGKILL ended, when all tests are done."""

    def __init__(self, log: Path, *words: str, **environment: str) -> None:
        self.log, self.mark = log, uuid.uuid4().hex
        self._seen: set[psutil.Process] = set()
        with log.open("a") as out:
            self.process = subprocess.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | environment | {_MARK: self.mark},
                preexec_fn=_hear_ctrl_c,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, happened: Callable[[], bool], seconds: float = 200) -> None:
        """Until something has happened; fails where the command ends before, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)
        self.all()

    def wait_for_step(self, run: Run, step: int = 1) -> None:
        """Until a checkpoint after so many steps, or more, is there."""
        directory = run.path(run.run_dir)
        self.wait_until(lambda: (checkpoints.steps(directory) or [0])[-1] >= step)

    def ended(self, seconds: float = 300) -> int:
        """Its exit status, once it has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended after {seconds} s: {self.output}") from None

    def all(self, name: str = "") -> list[psutil.Process]:
        """All that it has started and that runs, also what has lost its parent; with this in its command line."""
        ours = {process.pid for process in self._seen if process.is_running()}
        for process in sorted(psutil.process_iter(["create_time"]), key=lambda one: one.info["create_time"] or 0):
            with contextlib.suppress(psutil.Error):
                # some rename themselves over their environment: their parents do not
                if process.ppid() in ours or process.environ().get(_MARK) == self.mark:
                    self._seen.add(process)
                    ours.add(process.pid)
        return [process for process in self._seen if _runs(process, name)]

    def kill_one(self, name: str, rng: random.Random) -> bool:
        """SIGKILL to one of its processes with this in the command line; whether there was one."""
        found = sorted(self.all(name), key=lambda process: process.pid)
        if found:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(found).kill()
        return bool(found)

    def kill(self) -> None:
        """All of it at once, as when a machine goes."""
        for process in self.all():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if kind is not None:  # a test that failed: it is not to disturb the others
            self.kill()
            return
        left = self.all()
        if self.process.returncode == -signal.SIGKILL:
            _OUTLIVE.extend(left)  # `outlived` looks whether they are gone, when all tests are done
            return
        assert not Path(f"/tmp/jest-ray-{self.process.pid}").exists()
        assert not left, f"left behind: {left}"


def _hear_ctrl_c() -> None:
    """Where the tests run in the background a shell may have had SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _runs(process: psutil.Process, name: str) -> bool:
    try:
        running = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return running and name in " ".join(process.cmdline())
    except psutil.Error:
        return False


def outlived(seconds: float) -> list[psutil.Process]:
    """What commands that SIGKILL ended have left, and does not end within so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in _OUTLIVE if _runs(process, "")]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def bursts(kills: dict[str, int], rng: random.Random) -> list[list[str]]:
    """The kills, by victim and number, shuffled and cut into one to six at a time: a later one of a burst meets
    processes that are still starting."""
    victims = [victim for victim, n in kills.items() for _ in range(n)]
    rng.shuffle(victims)
    cut = []
    while victims:
        size = rng.randint(1, 6)
        cut.append(victims[:size])
        victims = victims[size:]
    return cut


def same_log_and_weights(run: Run, other: Run) -> None:
    """Row for row and bit for bit."""
    assert selection_log.read(run.path(run.run_dir)).equals(selection_log.read(other.path(other.run_dir)))
    weights = [checkpoints.read(each.path(each.run_dir))["state_dict"] for each in (run, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def finish(*words: str, **environment: str) -> str:
    """The output of a command that has to end well."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
