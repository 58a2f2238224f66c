"""How reading scales with the CPUs of a cluster: windows read ahead by plain Ray tasks, compared with Ray Data.

python -m tests.benchmarks.bench_reading [--cpus 8,16,64,256] [--seconds 1] [--each 8]

A stand-in sleeps where a task would read and decode a window, so that a machine of two cores can have any number of
logical CPUs, on raylets of at most 32. Linear is `each` windows of so many seconds one after the other on every CPU.
The workers have been started before.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import typer

from pipelines.stream.read_ahead import Share, read_ahead
from tests.benchmarks import sleeping
from tests.benchmarks.measure import console, machine, table

_A_RAYLET = 32  # logical CPUs


def _tasks(n: int, n_cpus: int, seconds: float) -> Iterator[int]:
    """By plain tasks, as a learner reads."""
    rows = read_ahead(
        iter(range(n)), lambda i: {"number": i}, lambda _: 1, 1, n, sleeping.read, Share(0, 1, None), seconds=seconds
    )
    return (one for one, _ in rows)


def _datasets(n: int, n_cpus: int, seconds: float) -> Iterator[int]:
    """By one small Ray dataset of a window for each CPU after the other, in order."""
    import ray.data

    def sleep(batch: Any) -> pa.Table:
        return sleeping.read({"number": int(batch["id"][0])}, seconds)

    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    numbers = iter(range(n))
    while some := list(islice(numbers, n_cpus)):
        dataset = ray.data.from_items([{"id": i} for i in some], override_num_blocks=len(some))
        for block in dataset.map_batches(sleep, batch_size=1).to_arrow_refs():
            yield from ray.get(block)["number"].to_pylist()


def _dataset(n: int, n_cpus: int, seconds: float) -> Iterator[int]:
    """By one Ray dataset of all windows, in order, as it streams."""
    import ray.data

    def sleep(batch: Any) -> pa.Table:
        return sleeping.read({"number": int(batch["id"][0])}, seconds)

    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    dataset = ray.data.from_items([{"id": i} for i in range(n)], override_num_blocks=n)
    for batch in dataset.map_batches(sleep, batch_size=1).iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch["number"].to_pylist()


CONTESTANTS: dict[str, Callable[[int, int, float], Iterator[int]]] = {
    "plain tasks": _tasks,
    "a small dataset after the other": _datasets,
    "one dataset": _dataset,
}


def contest(name: str, n_cpus: int, seconds: float, each: int) -> dict[str, float]:
    """One contestant on a cluster that this process starts."""
    from ray.cluster_utils import Cluster

    nodes = -(-n_cpus // _A_RAYLET)
    share = {"num_cpus": n_cpus // nodes, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=share)
    for _ in range(nodes - 1):
        cluster.add_node(**share)
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(log_to_driver=False)
    list(CONTESTANTS[name](4 * n_cpus, n_cpus, 10 * seconds * n_cpus / 256))  # starts the workers
    began, arrived = time.perf_counter(), []
    for number in CONTESTANTS[name](each * n_cpus, n_cpus, seconds):
        assert number == len(arrived)
        arrived.append(time.perf_counter() - began)
    ray.shutdown()
    cluster.shutdown()
    return {"first": arrived[0], "seconds": arrived[-1], "of_linear": each * seconds / arrived[-1]}


def measured(name: str, *numbers: float) -> dict[str, float]:
    """One contestant, in a separate process."""
    code = (
        "import json, sys; from tests.benchmarks.bench_reading import contest; name, n, seconds, each = sys.argv[1:]; "
        "print(json.dumps(contest(name, int(n), float(seconds), int(each))))"
    )
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", code, name, *map(str, numbers)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stdout}\n{ran.stderr}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def main(cpus: str = "8,16,64,256", seconds: float = 1.0, each: int = 8) -> None:
    """Measure how far each is from linear."""
    console.print(machine("cpu"))
    rows = []
    for n_cpus in map(int, cpus.split(",")):
        for name in CONTESTANTS:
            found = measured(name, n_cpus, seconds, each)
            first, whole, share = found["first"], found["seconds"], found["of_linear"]
            rows.append([str(n_cpus), name, f"{first:.1f}", f"{whole:.1f}", f"{share:.2f}"])
            console.print(*rows[-1])
    table("reading", ["logical CPUs", "read by", "first window, s", "all, s", "of linear"], rows)


if __name__ == "__main__":
    typer.run(main)
