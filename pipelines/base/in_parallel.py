"""Many calls of a function, or Ray tasks, of which only a limited number run at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from . import storage

_AT_ONCE = 32  # threads that read from the storage
_HELD = 1_000  # results that wait for the reader at most
_LOOK_SECONDS = 10.0  # after which it is seen that the cluster has grown
A = TypeVar("A")
T = TypeVar("T")


def read_each(function: Callable[[A], T], arguments: Sequence[A]) -> Iterator[T]:
    """The function's result for each argument, in order; in threads, with errors of the storage retried."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(arguments), _HELD):
            yield from pool.map(storage.retried(function), arguments[start : start + _HELD])


def ray_tasks(start: Callable[..., Any], jobs: Iterable[tuple[object, ...]], n: Callable[[], int]) -> Iterator[Any]:
    """Results of Ray tasks in the order in which they end, at most n() of them running, of a cluster that may grow.

    start: `remote` of a Ray function. jobs: its arguments for each task. Raises what a task raised.
    """
    import ray

    under_way: list[Any] = []
    for arguments in jobs:
        under_way.append(start(*arguments))
        while len(under_way) >= n():
            done, under_way = ray.wait(under_way, timeout=_LOOK_SECONDS)
            yield from ray.get(done)
    while under_way:
        done, under_way = ray.wait(under_way)
        yield from ray.get(done)
