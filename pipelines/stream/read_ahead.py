"""A list of things to read -> their rows, in order: by Ray tasks anywhere on the cluster, ahead of the caller.

One plain task for each. The list defines the order, the cluster's CPUs and its object store how far ahead is read.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pyarrow as pa
import ray

from ..base import cluster

T = TypeVar("T")

_TRIES = 20  # of a task whose process or node is lost
_LOOK_SECONDS = 5.0  # between two looks at the size of the cluster, which may grow and shrink
_AHEAD = 2  # tasks for each CPU: one that runs, and one that starts when it ends
_STORE_SHARE = 0.4  # of Ray's object stores: what tasks have read and no learner has taken yet


class Share:
    """A learner's share of the cluster: how much of it reads ahead for this learner."""

    def __init__(self, n_learners: int, most_cpus: int | None) -> None:
        """n_learners share the cluster. most_cpus: that read for all of them together; None: all there are."""
        self._n_learners, self._most_cpus, self._next_look = n_learners, most_cpus, 0.0
        self._n_tasks, self._n_bytes = 1, 0.0

    def has_room(self, n_tasks: int, n_bytes: float) -> bool:
        """Whether so many tasks, with tables of so many bytes together, may run or wait at once."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            n_cpus = min(cluster.reading_cpus(), self._most_cpus or math.inf)
            self._n_tasks = max(1, round(_AHEAD * n_cpus / self._n_learners))
            self._n_bytes = _STORE_SHARE * ray.cluster_resources().get("object_store_memory", 0) / self._n_learners
        return n_tasks <= self._n_tasks and n_bytes <= self._n_bytes


def read_ahead(
    planned: Iterator[T],
    item: Callable[[T], Mapping[str, Any]],
    n_bytes: Callable[[T], int],
    read: Callable[..., pa.Table],
    share: Share,
    **settings: Any,
) -> Iterator[tuple[T, pa.Table]]:
    """Each of `planned` with its rows, in order.

    item: turns one of them into what its task reads. n_bytes: roughly how many bytes its rows are going to have. read:
    the task, with the item and the keyword arguments `settings`.
    """
    task, common = _read.options(**cluster.for_reading()), ray.put(settings)  # type: Any, Any
    waiting: deque[tuple[T, ray.ObjectRef[pa.Table]]] = deque()

    def taken() -> tuple[T, pa.Table]:
        one, reference = waiting.popleft()
        return one, ray.get(reference)

    try:
        for one in planned:
            while waiting and not share.has_room(len(waiting) + 1, sum(n_bytes(each) for each, _ in waiting)):
                yield taken()
            waiting.append((one, task.remote(read, item(one), common)))
        while waiting:
            yield taken()
    finally:
        if ray.is_initialized():
            for _, reference in waiting:  # Ray would run those that nobody waits for any more
                ray.cancel(reference)


@ray.remote(max_retries=_TRIES)
def _read(read: Callable[..., pa.Table], item: Mapping[str, Any], settings: Mapping[str, Any]) -> pa.Table:
    return read(item, **settings)
