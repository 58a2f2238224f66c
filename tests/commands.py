"""Runs `jest` in a process: start it, wait for a checkpoint or a line of output, kill it, find what it left running."""

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

_MARK = "JEST_TEST_MARK"  # an environment variable that all processes started by a command inherit
# processes left by commands that SIGKILL ended: Ray's notice it and exit, the last one after a minute
_ORPHANS: list[psutil.Process] = []


def write(run: Run, folder: Path) -> Path:
    """Write the run file of a run into a folder; its path."""
    path = folder / f"{run.run_dir.replace('/', '-')}.yaml"
    path.write_text(run_file.dump(run))
    return path


def command(stage: str, run_file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", stage, str(run_file), *more]


class Command:
    """A running command, with its output in a file.

    As a context manager it asserts on exit that none of its processes is left. For a command that SIGKILL ended, a
    fixture in conftest.py checks that after all tests.
    """

    def __init__(self, log: Path, *words: str, **environment: str) -> None:
        self.log, self.mark = log, uuid.uuid4().hex
        self._seen: set[psutil.Process] = set()
        with log.open("a") as out:
            self.process = subprocess.Popen(
                words,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | environment | {_MARK: self.mark},
                preexec_fn=_restore_sigint,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, happened: Callable[[], bool], seconds: float = 200) -> None:
        """Wait until `happened()` is true; fail if the command ends before that, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)
        self.processes()

    def wait_for_step(self, run: Run, step: int = 1) -> None:
        """Wait for a checkpoint after this step or a later one."""
        directory = run.path(run.run_dir)
        self.wait_until(lambda: (checkpoints.steps(directory) or [0])[-1] >= step)

    def exit_status(self, seconds: float = 300) -> int:
        """Wait for the command to end; its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended after {seconds} s: {self.output}") from None

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The command's running processes, orphans too, whose command line contains `name`."""
        pids = {process.pid for process in self._seen if process.is_running()}
        for process in sorted(psutil.process_iter(["create_time"]), key=lambda one: one.info["create_time"] or 0):
            with contextlib.suppress(psutil.Error):
                # setting a process title may overwrite the environment; such a process is recognised by its parent
                if process.ppid() in pids or process.environ().get(_MARK) == self.mark:
                    self._seen.add(process)
                    pids.add(process.pid)
        return [process for process in self._seen if _runs(process, name)]

    def kill_one(self, name: str, rng: random.Random) -> bool:
        """Send SIGKILL to a random process whose command line contains `name`; whether there was one."""
        candidates = sorted(self.processes(name), key=lambda process: process.pid)
        if candidates:
            with contextlib.suppress(psutil.NoSuchProcess):
                rng.choice(candidates).kill()
        return bool(candidates)

    def kill(self) -> None:
        """Send SIGKILL to all processes of the command, as when a machine is lost."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if kind is not None:  # the test failed: its command must not disturb the next tests
            self.kill()
            return
        left = self.processes()
        if self.process.returncode == -signal.SIGKILL:
            _ORPHANS.extend(left)  # `orphans` checks after all tests that they are gone
            return
        assert not Path(f"/tmp/jest-ray-{self.process.pid}").exists()
        assert not left, f"left behind: {left}"


def _restore_sigint() -> None:
    """A shell that runs the tests in the background may have them ignore SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _runs(process: psutil.Process, name: str) -> bool:
    try:
        running = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return running and name in " ".join(process.cmdline())
    except psutil.Error:
        return False


def orphans(seconds: float) -> list[psutil.Process]:
    """Processes left by commands that SIGKILL ended, and still running after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in _ORPHANS if _runs(process, "")]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def bursts(kills: dict[str, int], rng: random.Random) -> list[list[str]]:
    """The kills (victim -> number), shuffled, in bursts of one to six: later kills of a burst hit processes that are
    still starting."""
    victims = [victim for victim, n in kills.items() for _ in range(n)]
    rng.shuffle(victims)
    out = []
    while victims:
        size = rng.randint(1, 6)
        out.append(victims[:size])
        victims = victims[size:]
    return out


def assert_same_log_and_weights(run: Run, other: Run) -> None:
    """Both runs have the same selection log, row for row, and the same weights, bit for bit."""
    assert selection_log.read(run.path(run.run_dir)).equals(selection_log.read(other.path(other.run_dir)))
    weights = [checkpoints.read(each.path(each.run_dir))["state_dict"] for each in (run, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def finish(*words: str, **environment: str) -> str:
    """Run a command that must succeed; its standard output."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
