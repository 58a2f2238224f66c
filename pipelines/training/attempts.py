"""The learners of a run, started by Ray Train: again where one fails or its node is taken away, on fewer while nodes
are missing, and on more once they are back.

Each attempt goes on from the newest checkpoint. An attempt that jest ends itself, for a node that is drained or for
room for more learners, ends with a checkpoint, and is no failure.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from textwrap import shorten
from typing import Any

from jest_core.run_file import Run
from jest_core.run_file.training import LearnerRange

from . import draining
from .heartbeat import Board, Order, Progress
from .room import Room


class Attempts:
    """fit: runs Ray Train with so many learners until they end, and raises what they raised. `run` is for a thread, and
    `look` for the one that waits for it."""

    def __init__(self, run: Run, board: Board, fit: Callable[[int], Any]) -> None:
        self._training, self._n_steps, self._board, self._fit = run.training, run.n_steps, board, fit
        given = run.training.n_learners
        self._range = given if isinstance(given, LearnerRange) else None
        self._room = Room(run.learner_numbers, run.training.gpus_per_learner)
        self._n, self._failures, self._on = run.training.max_learners, 0, set[str]()
        self.asks, self._lock = False, threading.Lock()  # whether room for more learners is asked for
        self.leaves_this_node = False  # whether the command's node is taken away
        # `look` finds drained nodes itself, and the learners end once their checkpoint is written; Ray Train's watcher
        # would be a process more, and end them when the notice is over
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

    def run(self) -> None:
        """Start learners until they come to the end of the run, are to stop for good, or fail too often."""
        try:
            while self._choose():
                try:
                    self._fit(self._n)
                except Exception as error:
                    if not self._tries_again(error):
                        raise
                else:
                    if self._have_ended():
                        break
        finally:
            with self._lock:
                self._range, self.asks = None, False  # `look` asks for no more
                self._room.leave()

    def _choose(self) -> bool:
        """Choose the number of learners; whether an attempt is to begin."""
        with self._lock:
            self.asks = False
            self._board.begin()
        if self._range is not None:
            wanted, seconds = self._n, 60 * self._range.wait_minutes
            self._n = self._room.wait(self._n, seconds, self._is_over, self._board.tell)
            if 0 < self._n < wanted:
                self._board.tell(f"goes on with {self._n} of {wanted} learners: the cluster has no room for more")
        self._on = set()
        return not self._is_over()

    def _have_ended(self) -> bool:
        """Whether learners that ended without an error came to the end, even if they were to be started again."""
        return self._board.order(Order.go_on) == Order.go_on or self._board.get().step >= self._n_steps

    def _is_over(self) -> bool:
        return self._board.order(Order.go_on) == Order.stop

    def _tries_again(self, error: Exception) -> bool:
        if self._board.get().failure or self._is_over():
            return False
        if self._was_taken():
            self._board.tell("a node with learners was taken away: they start again from the newest checkpoint")
            return True
        if self._range is not None and _found_no_room(error):
            self._board.tell(f"the cluster has no room for {self._n} learners after all: looks how many fit")
            return True
        self._failures += 1
        most = self._training.max_failures
        if 0 <= most < self._failures:
            return False
        times = f"{self._failures} of training.max_failures {most}" if most >= 0 else f"{self._failures}"
        self._board.tell(f"{_reason(error)}; the learners start again from the newest checkpoint: failure {times}")
        return True

    def _was_taken(self) -> bool:
        return self._board.order(Order.go_on) == Order.restart or draining.were_taken(self._on)

    def look(self, seen: Progress) -> None:
        """Have the learners end with a checkpoint where a node of theirs is drained, or there is room for more."""
        self._on |= set(seen.nodes.values())
        if leaving := draining.leaving():
            self.leaves_this_node |= draining.here() in leaving
            if set(seen.nodes.values()) & leaving and self._board.order(Order.go_on) < Order.restart:
                self._board.order(Order.restart)
                self._board.tell("a node with learners is drained: they write a checkpoint, and go on elsewhere")
        with self._lock:
            self._grow()

    def _grow(self) -> None:
        """Once all learners run, ask for more; once there is room, have these end with the next checkpoint."""
        nodes = self._board.get().nodes
        if self._range is None or not 0 < self._n <= len(nodes) or self._n == self._training.max_learners:
            return
        if not self.asks:
            self._room.ask(self._n, set(nodes.values()))
            self.asks = True
        if (n := self._room.fits()) > self._n:
            self._n = n
            if self._board.order(Order.restart_at_checkpoint) == Order.restart_at_checkpoint:
                self._board.tell(f"the cluster has room for {n} learners: they go on from the next checkpoint")


def _found_no_room(error: Exception) -> bool:
    """Whether Ray Train could not start the learners' workers, which it asks for anew if it may."""
    from ray.train.v2._internal.execution.failure_handling.default import RETRYABLE_CONTROLLER_ERRORS

    return isinstance(getattr(error, "controller_failure", None), RETRYABLE_CONTROLLER_ERRORS)


def _reason(error: Exception) -> str:
    """Which learner failed, and the last line of what it raised."""
    failures = getattr(error, "worker_failures", {})  # of Ray Train: rank -> what that learner raised
    for rank, failure in failures.items():
        lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
        return f"learner {rank} failed ({shorten(lines[-1] if lines else type(failure).__name__, 200)})"
    return f"the learners failed ({error})"
