"""What is to be read -> its rows, in order: by tasks of Ray Data anywhere on the cluster, while the caller works.

Ray Data executes the order, it does not define it.
"""

from collections.abc import Callable, Iterator
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
    item: Callable[[T], dict[str, Any]],
    size: Callable[[T], int],
    read: Callable[..., pa.Table],
    n_ahead: int,
    n_cpus: int,
    **settings: Any,
) -> Iterator[tuple[T, pa.Table]]:
    """What is planned, each with its rows, in order, read by tasks of Ray Data anywhere on the cluster.

    item: what a task is told of one; size: its number of rows; n_ahead: so many in one Ray dataset; n_cpus: so
    many tasks at once.
    """
    cluster.data_context(n_cpus)

    def start(some: list[T]) -> list[Any]:
        """One Ray dataset -> references to its blocks, in order."""
        dataset = ray.data.from_items([item(one) for one in some], override_num_blocks=len(some)).map_batches(
            read,
            batch_size=1,
            batch_format="numpy",
            fn_kwargs=settings,
        )
        return dataset.to_arrow_refs()

    # One dataset at a time, and the next while this one is consumed. A dataset over the whole run would leave its
    # bound to Ray Data's backpressure, whose scheduler then spins in the learner's process and takes its interpreter.
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        some = list(islice(planned, n_ahead))
        reading = reader.submit(start, some)
        while some:
            blocks_in = iter(reading.result())
            coming = list(islice(planned, n_ahead))
            if coming:
                reading = reader.submit(start, coming)
            for one in some:
                # Ray may split a task's block; order is preserved, so its parts follow each other
                parts: list[pa.Table] = []
                while sum(map(len, parts)) < size(one):
                    parts.append(ray.get(next(blocks_in)))
                yield one, pa.concat_tables(parts)
            some = coming
