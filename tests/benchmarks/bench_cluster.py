"""The schedule of many learners that share the CPUs of a cluster for reading: who waits, memory, a lost node.

python -m tests.benchmarks.bench_cluster [--nodes 8] [--cpus 8] [--learners 64] [--step-seconds 4] [--steps 30]

Real: Ray's nodes, shards, reading, decoding, the order, read-ahead and its limits. Not real: a learner does not train
but sleeps, all for the same time, after the slowest has its share of the super-batch, as learners do that select
together. The logical CPUs share this machine's, so that the rate of reading is this machine's; what scales is the
schedule. Learners are on the first half of the nodes; half-way a node of the other half, which only reads, is killed.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer
import webdataset

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base.prefetch import prefetch
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from tests.benchmarks.contestants import FOLDER, PER_SHARD, RUN, make_shards
from tests.benchmarks.measure import console, machine, table

_GROUP = 50  # rows of a row group, and of a window


@ray.remote(num_cpus=0)
class Learners:
    """Some of the learners, those of a node: a thread reads ahead for each, as in training."""

    def __init__(self, text: str, ranks: list[int], n_learners: int, image_size: int) -> None:
        run = run_file.load(text)
        source = open_source(run)
        self._ahead = [
            prefetch(super_batches.stream(run, source, image_size, rank=rank, n_learners=n_learners, first_step=0))
            for rank in ranks
        ]
        self._pool = ThreadPoolExecutor(len(ranks))

    def step(self) -> list[tuple[float, bytes]]:
        """Of each learner: the seconds that it waited for its share of the next super-batch, and the share's uids."""

        def draw(ahead: Any) -> tuple[float, bytes]:
            began = time.perf_counter()
            rows = next(ahead).rows
            waited = time.perf_counter() - began
            return waited, np.stack([rows["uid_high"].to_numpy(), rows["uid_low"].to_numpy()]).T.tobytes()

        return list(self._pool.map(draw, self._ahead))

    def close(self) -> None:
        for ahead in self._ahead:
            ahead.close()


class _Watch(threading.Thread):
    """What Ray's processes and object stores take, every second."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.address, self.over = address, threading.Event()
        self.private = self.stored = self.spilled = 0

    def run(self) -> None:
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(self.address)
        while not self.over.wait(2):
            memory = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    memory += process.memory_full_info().uss
                except psutil.Error:
                    continue
            self.private = max(self.private, memory)
            try:
                stats = get_memory_info_reply(state).store_stats
            except Exception:  # while a node is lost
                continue
            self.stored = max(self.stored, stats.object_store_bytes_used)
            self.spilled = max(self.spilled, stats.spilled_bytes_total)


def simulate(
    run: Run, *, nodes: int, cpus: int, store_bytes: int, n_learners: int, step_seconds: float, lose: bool
) -> dict[str, Any]:
    """Run all steps on a cluster that this process starts. run: with a catalogue, and no cached scores."""
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from jest_core.models import configurations

    share = {"num_cpus": cpus, "object_store_memory": store_bytes}
    cluster = Cluster(initialize_head=True, head_node_args=share)
    others = [cluster.add_node(**share) for _ in range(nodes - 1)]
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(log_to_driver=False)
    hosts = [node["NodeID"] for node in ray.nodes() if node["NodeID"] not in {o.node_id for o in others[nodes // 2 :]}]
    image_size = configurations.inputs_of(run.model).view.image_size
    each = -(-n_learners // len(hosts))
    groups = [list(range(i, min(i + each, n_learners))) for i in range(0, n_learners, each)]
    learners = [
        Learners.options(  # type: ignore[attr-defined]
            scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False)
        ).remote(run_file.dump(run), ranks, n_learners, image_size)
        for host, ranks in zip(hosts, groups, strict=False)
    ]
    watch = _Watch(ray.get_runtime_context().gcs_address)
    watch.start()
    hashes, waits, ends = [], [], []
    for step in range(run.n_steps):
        if lose and step == run.n_steps // 2:
            cluster.remove_node(others[-1], allow_graceful=False)
        shares = [one for group in ray.get([each.step.remote() for each in learners]) for one in group]
        waits.append([wait for wait, _ in shares])
        ends.append(time.perf_counter())
        hashes.append(hashlib.sha256(b"".join(uids for _, uids in shares)).hexdigest()[:16])
        time.sleep(step_seconds)
    watch.over.set()
    ray.get([each.close.remote() for each in learners])
    ray.shutdown()
    cluster.shutdown()
    return {
        "hash": hashes,
        "waits": waits,
        "periods": np.diff(ends).tolist(),
        "private_bytes": watch.private,
        "stored_bytes": watch.stored,
        "spilled_bytes": watch.spilled,
    }


def simulated(run: Run, **settings: Any) -> dict[str, Any]:
    """`simulate` in a separate process."""
    code = (
        "import json, sys; from jest_core import run_file; from tests.benchmarks.bench_cluster import simulate; "
        "print(json.dumps(simulate(run_file.load(sys.argv[1]), **json.loads(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, run_file.dump(run), json.dumps(settings)]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ran.returncode:
        raise RuntimeError(f"{ran.stdout}\n{ran.stderr}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def main(
    nodes: int = 8,
    cpus: int = 8,
    learners: int = 64,
    step_seconds: float = 4.0,
    steps: int = 30,
    share: int = 16,
    store_mb: int = 200,
    n: int = 20_000,
) -> None:
    """Print it for learners that are slower and faster than this machine reads. share: of a learner, in examples."""
    from pipelines.data import catalogue

    console.print(machine("cpu"))
    make_shards(FOLDER / "shards", FOLDER / "raw", n)
    size = learners * share
    root = FOLDER / f"cluster-{os.getpid()}"
    _as_parquet(FOLDER / "shards", root / "shards", n)
    text = RUN.format(
        root=root, shards=f"{root}/shards", decode="eager", method="uniform", trained=steps * size, size=224
    )
    overrides = [
        f"training.sub_batch_size={size}",
        f"data.n_streams={learners}",
        f"data.window_rows={_GROUP}",
        f"training.n_learners={learners}",
    ]
    run = run_file.load(text, overrides)
    catalogue.run_stage(run)
    rows, hashes = [], []
    settings = {"nodes": nodes, "cpus": cpus, "store_bytes": store_mb << 20}
    for seconds, lose in ((step_seconds, False), (step_seconds, True), (0.0, False)):
        found = simulated(run, **settings, n_learners=learners, step_seconds=seconds, lose=lose)
        rows.append(_row(found, seconds, size, lose=lose))
        console.print(*rows[-1])
        hashes.append(found["hash"])
    names = [
        "a step sleeps, s",
        "node lost",
        "examples/s",
        "waits: mean, most",
        "longest step, s",
        "store, spilled, private MB",
    ]
    if len({tuple(steps_of) for steps_of in hashes}) > 1:
        raise RuntimeError(
            "the learners had other examples, or in another order, where a node was lost or steps were fast"
        )
    table(f"{learners} learners on {nodes} nodes with {cpus} logical CPUs each", names, rows)


def _as_parquet(tars: Path, folder: Path, n: int) -> None:
    """The pairs of the first tars as Parquet with small row groups, as `jest ingest` writes them."""
    folder.mkdir(parents=True)
    for path in sorted(tars.glob("*.tar"))[: n // PER_SHARD]:
        rows = [
            {"jpg": one["jpg"], "caption": one["txt"].decode()}
            for one in webdataset.WebDataset(str(path), shardshuffle=False)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{path.stem}.parquet", row_group_size=_GROUP)


def _row(found: dict[str, Any], seconds: float, size: int, *, lose: bool) -> list[str]:
    waits = np.array(found["waits"])[2:]  # the first steps start the readers
    periods = np.array(found["periods"])[1:]
    memory = ", ".join(f"{found[name] / 1e6:,.0f}" for name in ("stored_bytes", "spilled_bytes", "private_bytes"))
    return [
        f"{seconds:g}",
        "yes" if lose else "no",
        f"{size / periods.mean():.0f}",
        f"{waits.mean() / periods.mean():.0%}, {waits.mean(0).max() / periods.mean():.0%}",
        f"{periods.max():.1f}",
        memory,
    ]


if __name__ == "__main__":
    typer.run(main)
