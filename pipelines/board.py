"""The board: where the learners say how far they are, and read whether they are to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray


@dataclass
class Progress:
    step: int = 0
    note: str = ""
    failure: str = ""  # why the run is over, which no restart would mend


@ray.remote(num_cpus=0)
class _Board:
    def __init__(self) -> None:
        self.progress, self.stopping = Progress(), False

    def put(self, step: int, note: str) -> bool:
        self.progress.step, self.progress.note = step, note
        return self.stopping

    def fail(self, reason: str) -> None:
        self.progress.failure = self.progress.failure or reason

    def get(self) -> Progress:
        return self.progress

    def stop(self) -> None:
        self.stopping = True


class Board:
    """A handle that travels to the learners."""

    def __init__(self) -> None:
        self._actor: Any = _Board.remote()  # type: ignore[attr-defined]
        self._answer: Any = None

    def put(self, step: int, note: str) -> None:
        """Say how far the run is; does not wait."""
        self._answer = self._actor.put.remote(step, note)

    def fail(self, reason: str) -> None:
        """Say that the run is over, and why, which the first who fails knows; returns once that is told."""
        ray.get(self._actor.fail.remote(reason))

    def is_stopping(self) -> bool:
        """Whether the learners were told to stop when this one last put something."""
        return self._answer is not None and bool(ray.get(self._answer))

    def get(self) -> Progress:
        found: Progress = ray.get(self._actor.get.remote())
        return found

    @contextlib.contextmanager
    def stop_on_sigterm(self) -> Iterator[threading.Event]:
        """Within the block SIGTERM tells the learners to stop, and sets the event; it ends no process by itself."""
        told = threading.Event()
        if threading.current_thread() is not threading.main_thread():  # signals reach no other
            yield told
            return

        def handle(*_: Any) -> None:
            told.set()
            self._actor.stop.remote()

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield told
        finally:
            signal.signal(signal.SIGTERM, before)
