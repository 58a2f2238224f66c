"""python -m tests.streaming ROOT OUT: a catalogue of ten times the object store, streamed to 2 and to 8 consumers.

It starts a separate Ray, whose object store has the least memory that Ray allows. It writes one JSON object to OUT: for
each number of consumers the hash of each super-batch, the bytes streamed, the memory of all of Ray's processes in the
second and the last third of the steps, and the bytes that the object store spilled.
"""

import hashlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import cluster, storage
from pipelines.data import catalogue
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from tests.conftest import RUN

STORE = 80 << 20
N_SHARDS, ROWS, GROUP = 10, 384, 8
EACH = 4  # steps between two measurements of the memory
SIZE = 32  # of jest-tiny's pictures


def write_shards(root: str) -> int:
    """Shards of uncompressed noise (large, fast to decode), whose rows differ in URL and so in uid; their bytes."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(GROUP):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (276, 276, 3), dtype=np.uint8)).save(sink, "PNG", compress_level=0)
        images.append(sink.getvalue())
    total = 0
    for number in range(N_SHARDS):
        rows = range(number * ROWS, (number + 1) * ROWS)
        table = pa.table(
            {
                "url": [f"http://x/{i}" for i in rows],
                "caption": [f"picture {i}" for i in rows],
                "png": [images[i % GROUP] for i in rows],
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=GROUP, compression="none", use_dictionary=False)
        storage.write_bytes(f"{root}/shards/{number:05d}.parquet", sink.getvalue())
        total += len(sink.getvalue())
    return total


@ray.remote(num_cpus=0)
class Consumer:
    """Reads a learner's share of the stream, without training."""

    def __init__(self, text: str, rank: int, n_learners: int) -> None:
        cluster.data_context()
        self.run, self.rank, self.n_learners = run_file.load(text), rank, n_learners

    def start(self) -> None:
        self.opened = _count_opened_shards()
        source = open_source(self.run)
        self.shares = super_batches.stream(
            self.run, source, SIZE, rank=self.rank, n_learners=self.n_learners, first_step=0
        )

    def next(self) -> tuple[bytes, int]:
        """This share of the next super-batch: its uids, and the bytes of its images."""
        rows = next(self.shares).rows
        assert not self.opened, "a consumer opened a shard itself"
        uids = np.stack([rows["uid_high"].to_numpy(), rows["uid_low"].to_numpy()]).T
        return uids.tobytes(), rows["image"].nbytes


def _count_opened_shards() -> list[str]:
    """A list to which the paths of shards that this process opens from now on are appended."""
    from pipelines.data import layouts

    opened: list[str] = []
    original = layouts.open_shard

    def noted(path: str, *arguments: Any) -> Any:
        opened.append(path)
        return original(path, *arguments)

    for module in (layouts, catalogue):
        module.open_shard = noted  # type: ignore[attr-defined]
    return opened


def memory() -> int:
    """Private memory (USS) of this process and its descendants, in bytes."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total


def spilled() -> int:
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)


def stream(run: Run, n_consumers: int) -> dict[str, Any]:
    """Stream all super-batches; consumers wait for each other after each step, as learners do."""
    text = run_file.dump(run)
    consumers = [Consumer.remote(text, rank, n_consumers) for rank in range(n_consumers)]  # type: ignore[attr-defined]
    before, began, hashes, n_bytes, used = spilled(), time.monotonic(), [], 0, []
    ray.get([c.start.remote() for c in consumers])
    for step in range(run.n_steps):
        shares = ray.get([c.next.remote() for c in consumers])
        hashes.append(hashlib.sha256(b"".join(uids for uids, _ in shares)).hexdigest()[:16])
        n_bytes += sum(n for _, n in shares)
        if step % EACH == 0:  # rarely, as USS is slow to measure for some thirty processes
            used.append(memory())
    third = len(used) // 3
    return {
        "consumers": n_consumers,
        "hash": hashes,
        "bytes": n_bytes,
        "early_bytes": int(np.mean(used[third : 2 * third])),
        "late_bytes": int(np.mean(used[2 * third :])),
        "spilled_bytes": spilled() - before,
        "seconds": round(time.monotonic() - began, 1),
    }


def main(root: str, out: str) -> None:
    # "local": start a Ray here, never connect to one of another test
    ray.init(
        "local",
        num_cpus=4,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    size = write_shards(root)
    n = N_SHARDS * ROWS
    overrides = [
        "selection.method=uniform",
        "data.rules=[]",
        "data.n_streams=8",
        f"data.window_rows={GROUP}",
        "training.sub_batch_size=64",
        f"training.examples_trained={n}",
    ]
    run = run_file.load(RUN.format(root=root, name="x", shards="shards"), overrides)
    catalogue.run_stage(run)
    results = {"shard_bytes": size, "store_bytes": STORE, "runs": [stream(run, 2), stream(run, 8)]}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
