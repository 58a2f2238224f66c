"""A list of things to read -> their rows, in order: by tasks of Ray Data anywhere on the cluster, ahead of the caller.

The list defines the order; Ray Data only executes it.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data

from ..base import cluster

T = TypeVar("T")


def read_ahead(
    planned: Iterator[T],
    item: Callable[[T], Mapping[str, Any]],
    size: Callable[[T], int],
    read: Callable[..., pa.Table],
    n_ahead: int,
    n_cpus: int,
    **settings: Any,
) -> Iterator[tuple[T, pa.Table]]:
    """Each of `planned` with its rows, in order, read by tasks of Ray Data anywhere on the cluster.

    item: turns one of them into the row of Ray Data that its task gets. size: its number of rows. read: the task, with
    the keyword arguments `settings`. n_ahead: how many are in one Ray dataset. n_cpus: how many tasks run at once.
    """
    cluster.data_context(n_cpus)

    def start(some: list[T]) -> "list[ray.ObjectRef[pa.Table]]":
        """Run one Ray dataset; returns references to its blocks, in order."""
        dataset = ray.data.from_items([item(one) for one in some], override_num_blocks=len(some)).map_batches(
            read,
            batch_size=1,
            batch_format="numpy",
            fn_kwargs=settings,
        )
        return dataset.to_arrow_refs()

    # One dataset at a time, and the next while this one is consumed. A dataset over the whole run would be bounded by
    # Ray Data's backpressure only, whose scheduler then spins in the learner's process and keeps its interpreter busy.
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        some = list(islice(planned, n_ahead))
        reading = reader.submit(start, some)
        while some:
            blocks_in = iter(reading.result())
            coming = list(islice(planned, n_ahead))
            if coming:
                reading = reader.submit(start, coming)
            for one in some:
                # Ray may split the block of a task; as it preserves the order, the parts follow each other
                parts: list[pa.Table] = []
                while sum(map(len, parts)) < size(one):
                    parts.append(ray.get(next(blocks_in)))
                yield one, pa.concat_tables(parts)
            some = coming
