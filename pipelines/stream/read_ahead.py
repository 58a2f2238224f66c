"""A list of things to read -> their rows, in order: by Ray tasks anywhere on the cluster, ahead of the caller.

One plain task for each. The list defines the order; the cluster's CPUs and its object store decide how far ahead of
the learner it is read.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from typing import Any, Generic, TypeVar

import pyarrow as pa
import ray

from ..base import cluster

T = TypeVar("T")

TASK = "read_window"  # its name in Ray, and in the title of the process that runs it
_TRIES = 20  # of a task whose process or node is lost
_LOOK_SECONDS = 5.0  # between two looks at the size of the cluster, which may grow and shrink
_COMING = 4  # that come from other nodes at once, those that are read: one alone comes at about 1 GB a second
_WAKE_SECONDS = 1.0  # after which a thread that waits for a task looks whether it is to end
STORE_SHARE = 0.4  # of Ray's object stores: what tasks read and no learner has taken yet


class Share:
    """A learner's share of the cluster: how much of it reads ahead for this learner."""

    def __init__(self, rank: int, n_learners: int, read_cpus: int | None) -> None:
        """n_learners share the cluster. read_cpus: CPUs that read for all of them together; None: all there are."""
        self.n_learners, self._rank = n_learners, rank
        self._at_once, self._next_look = cluster.n_tasks(read_cpus), 0.0
        # one more than run, so that no CPU waits for its next task; those that wait make an autoscaler start nodes
        self._waiting = 0 if cluster.is_local() or read_cpus or cluster.grows() else 1

    def look(self) -> tuple[int, float]:
        """How many tasks may run or wait at once, and how many bytes they and their tables may have together."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            n, learners, rank = self._at_once(), self.n_learners, self._rank
            self._n_tasks = max(1, (rank + 1) * n // learners - rank * n // learners) + self._waiting
            self._n_bytes = STORE_SHARE * ray.cluster_resources().get("object_store_memory", 0) / self.n_learners
        return self._n_tasks, self._n_bytes


def read_ahead(
    planned: Iterator[T],
    item: Callable[[T], Mapping[str, Any]],
    n_rows: Callable[[T], int],
    row_bytes: int,
    most_rows: int,
    read: Callable[..., pa.Table],
    share: Share,
    **settings: Any,
) -> Generator[tuple[T, pa.Table], None, None]:
    """Each of `planned` with its rows, in order.

    item: turns one of them into what its task reads. n_rows: of one of them. row_bytes: of a row, roughly, until the
    first ones have come. most_rows: that are ready and not taken, at most, whatever room there is. read: the task, with
    the item and the keyword arguments `settings`.
    """
    task: Any = _read.options(name=TASK, num_cpus=1, scheduling_strategy="SPREAD")
    common = ray.put(settings)
    reader = _Reader(planned, lambda one: task.remote(read, item(one), common), n_rows, row_bytes, most_rows, share)
    try:
        yield from reader.rows()
    finally:
        reader.stop()


@ray.remote(max_retries=_TRIES)
def _read(read: Callable[..., pa.Table], item: Mapping[str, Any], settings: Mapping[str, Any]) -> pa.Table:
    return read(item, **settings)


class _Reader(Generic[T]):
    """Submits tasks, in a thread, whenever the share has room for another one."""

    def __init__(
        self,
        planned: Iterator[T],
        submit: Callable[[T], "ray.ObjectRef[pa.Table]"],
        n_rows: Callable[[T], int],
        row_bytes: int,
        most_rows: int,
        share: Share,
    ) -> None:
        self._planned, self._submit, self._share = planned, submit, share
        self._n_rows, self._row_bytes, self._most_rows = n_rows, float(row_bytes), most_rows
        self._submitted: deque[tuple[T, ray.ObjectRef[pa.Table]]] = deque()  # which the learner has not taken
        self._rows, self._taken_rows, self._taken_bytes = 0, 0, 0  # rows: of these
        self._changed = threading.Condition()
        self._ends = self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="read-ahead")
        self._thread.start()

    def rows(self) -> Iterator[tuple[T, pa.Table]]:
        """Raises what planning raised, and what a task raised."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._submitted or self._ended)
                if not self._submitted:
                    break
                one, reference = self._submitted[0]
                soon = [later for _, later in islice(self._submitted, _COMING)]
            ray.wait(soon, timeout=0)  # from now on Ray sends them here, all at the same time
            table = ray.get(reference)
            del reference, soon  # or the table would stay in the object store until the next one is there
            with self._changed:
                self._submitted.popleft()
                self._rows -= self._n_rows(one)
                self._taken_rows, self._taken_bytes = self._taken_rows + len(table), self._taken_bytes + table.nbytes
                self._row_bytes = self._taken_bytes / max(1, self._taken_rows)
                self._changed.notify_all()
            yield one, table
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the thread, and the tasks whose rows nobody takes any more."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        self._thread.join(2 * _WAKE_SECONDS)
        if ray.is_initialized():
            for _, reference in self._submitted:
                ray.cancel(reference)

    def _run(self) -> None:
        try:
            for one in self._planned:
                n_rows = self._n_rows(one)
                self._wait_for_room(n_rows)
                if self._ends:
                    break
                reference = self._submit(one)
                with self._changed:
                    self._submitted.append((one, reference))
                    self._rows += n_rows
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _wait_for_room(self, n_rows: int) -> None:
        """Until the share has room for a task that reads so many rows, or the thread is to end."""
        while not self._ends:
            with self._changed:
                while not (self._ends or self._has_room(n_rows)):
                    self._changed.wait()
                references = [reference for _, reference in self._submitted]  # those of all others have ended
            n_tasks, _ = self._share.look()
            if len(references) < n_tasks:
                return
            _, unfinished = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
            if len(unfinished) < n_tasks:
                return
            ray.wait(unfinished, timeout=_WAKE_SECONDS, fetch_local=False)

    def _has_room(self, n_rows: int) -> bool:
        n_tasks, n_bytes = self._share.look()
        rows = self._rows + n_rows
        enough = rows > self._most_rows + n_tasks * n_rows
        return not self._submitted or (not enough and rows * self._row_bytes <= n_bytes)
