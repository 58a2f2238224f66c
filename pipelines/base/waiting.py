"""Says what Ray waits for, where a stage has not moved since, and ends the stage after a while.

Ray waits for nodes that have what is asked for without a word, and for ever. A thread of the process that runs a stage
looks at what waits; the stage's progress, and tasks of its that run, count as movement: others then wait for them.
"""

import dataclasses
import os
import signal
import threading
import time
from types import FrameType

from . import demand, own_work, progress
from .demand import Cluster
from .own_work import OwnWork

VARIABLE = "JEST_WAIT_MINUTES"
_MINUTES = 60.0
_LOOK_SECONDS = 5.0
_PATIENCE = 25.0  # seconds without movement before the first line
_REPEAT = 600.0  # seconds between lines
_CLEAR = 3  # looks at which nothing waits, before that counts: Ray Train asks anew from time to time
_WAKE = getattr(signal, "SIGURG", None)  # by which the thread ends the main thread's wait; ignored by default


class NoRoom(RuntimeError):
    """The cluster had no room for what a stage asks for, for as long as it may wait."""


class Watch:
    """Watches the Ray that this process has joined, until `stop`. alone: it is one machine, which no other joins."""

    def __init__(self, *, alone: bool) -> None:
        self._alone, self._limit = alone, 60 * minutes()
        self._over = threading.Event()
        self.failure: Exception | None = None  # with which the stage has been ended
        self._last = 0.0  # progress
        self._clear = 0
        self._handles = _WAKE is not None and threading.current_thread() is threading.main_thread()
        if self._handles and _WAKE is not None:
            signal.signal(_WAKE, self._raise)
        self._thread = threading.Thread(target=self._run, daemon=True, name="waiting")
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self.failure = None
        self._thread.join(_LOOK_SECONDS)

    def _run(self) -> None:
        still, said = time.monotonic(), -_REPEAT
        while not self._over.wait(_LOOK_SECONDS):
            try:
                cluster = demand.look()
            except Exception:  # a head that cannot be reached now: the stage itself meets that
                continue
            now = time.monotonic()
            if self._moves(cluster):
                still = now
            waited = now - still
            if not cluster.waiting or waited < _PATIENCE:
                continue
            work = own_work.look()
            cluster = self._own(cluster, work)
            if (work is not None and work.runs) or not cluster.waiting:
                still = now
                continue
            never = bool(cluster.never())
            in_vain = self._alone and never
            if in_vain or (waited >= self._limit and (work is not None or (never and cluster.coming is None))):
                self._end(_text(cluster, waited, self._alone), in_vain=in_vain)
                return
            if now - said >= _REPEAT:
                said = now
                ends = f"; the stage ends after {self._limit / 60:g} minutes of that ({VARIABLE})"
                progress.warn("ray", _text(cluster, waited, self._alone) + ends)

    def _moves(self, cluster: Cluster) -> bool:
        """Whether the stage has moved since the last look, or nothing waits."""
        before, self._last = self._last, progress.moved()
        self._clear = 0 if cluster.waiting else self._clear + 1
        return self._clear >= _CLEAR or before != self._last

    def _own(self, cluster: Cluster, work: OwnWork | None) -> Cluster:
        """What waits, without tasks and actors where those are of other jobs alone. Groups are this job's."""
        if self._alone or (work is not None and work.waits):
            return cluster
        return dataclasses.replace(cluster, waiting=[each for each in cluster.waiting if each.group])

    def _end(self, text: str, *, in_vain: bool) -> None:
        if not self._handles or _WAKE is None:
            progress.warn("ray", text)
            return
        self.failure = ValueError(text) if in_vain else NoRoom(text)
        signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.failure is not None:
            raise KeyboardInterrupt  # no other exception ends a call of Ray's that waits


def minutes() -> float:
    """For how long a stage waits for room. Raises ValueError where the variable has no such number."""
    text = os.environ.get(VARIABLE, str(_MINUTES))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ValueError(f"{VARIABLE}={text} is no number of minutes above 0, such as 30, or inf to wait for ever")
    return value


def _text(cluster: Cluster, waited: float, alone: bool) -> str:
    asked = " and ".join(map(str, cluster.waiting))
    never = cluster.never()
    less = "training.n_learners, training.gpus_per_learner, reference.gpus_per_actor, evaluation.gpus"
    if alone and never:
        remedy = (
            f"no other machine joins a Ray that jest starts: ask for less ({less}), or set RAY_ADDRESS to a cluster"
        )
    elif cluster.coming is not None:
        coming = ", ".join(f"{n} {kind}" for kind, n in cluster.coming.items()) or "none so far"
        remedy = f"its autoscaler starts more nodes: {coming}"
    elif never:
        remedy = f"it has no autoscaler: add nodes, or ask for less ({less})"
    else:
        remedy = (
            "add nodes, end other jobs, or ask for less; a run that trains needs a CPU for each learner, and one more"
        )
    there = cluster.describe()
    return f"nothing has moved for {waited:.0f} s: Ray waits for room for {asked}; there are {there}; {remedy}"
