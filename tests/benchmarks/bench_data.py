"""Examples delivered to a learner: jest's data plane compared with open_clip's pipeline and a plain PyTorch DataLoader.

python -m tests.benchmarks.bench_data [--n 20000] [--shards FOLDER] [--raw FOLDER]

All read the same tars: JPEGs of 512 pixels, quality 90, rendered once from published SVG drawings. All have the same
output: normalised float pixels of 224 and 77 tokens a caption. Each contestant runs in a separate process tree, and its
figures start with its first batch. Before that, the cost of planning an epoch of two billion rows is measured.
"""

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import psutil
import typer

from jest_core.examples.order import Order
from tests.benchmarks.contestants import CONTESTANTS, FOLDER, PER_SHARD, make_shards
from tests.benchmarks.measure import console, machine, peak_bytes, table, threads


class _Watch(threading.Thread):
    """Measures CPU seconds and peak memory of this process and its descendants."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.cpu: dict[int, float] = {}
        self.peak = 0
        self.over = threading.Event()

    def measure(self) -> float:
        """Update the peak memory; CPU seconds so far, for ended processes those of the last measurement."""
        memory = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                times = process.cpu_times()
                self.cpu[process.pid] = times.user + times.system
                memory += process.memory_full_info().pss
            except psutil.Error:
                continue
        self.peak = max(self.peak, memory)
        return sum(self.cpu.values())

    def run(self) -> None:
        while not self.over.wait(2):  # rarely, as measuring takes CPU time too
            self.measure()


def contest(name: str, shards: str, n: int, work: Path) -> dict[str, float]:
    """One contestant, in this process."""
    threads()
    watch = _Watch()
    watch.start()
    batches = CONTESTANTS[name](shards, n, work)
    next(batches)  # starts the processes and warms the caches
    cpu, began = watch.measure(), time.perf_counter()
    count = sum(batches)
    seconds, used = time.perf_counter() - began, watch.measure() - cpu
    watch.over.set()
    return {"examples": count, "per_second": count / seconds, "cpu_ms": 1e3 * used / count, "peak": watch.peak}


def measured(name: str, shards: str, n: int, work: Path) -> dict[str, float]:
    """One contestant, in a separate process."""
    folder = work / f"{name}-{n}"
    folder.mkdir()
    out = folder / "result.json"
    code = (
        "import json, sys; from pathlib import Path; from tests.benchmarks.bench_data import contest; "
        "name, shards, n, work, out = sys.argv[1:]; "
        "Path(out).write_text(json.dumps(contest(name, shards, int(n), Path(work))))"
    )
    command = [sys.executable, "-c", code, name, shards, str(n), str(folder), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stdout}\n{ran.stderr}")
    return dict(json.loads(out.read_text()))


# -------------------------------------------------------------------------------------------------------- two billion


def _order(n_rows: int) -> Order:
    """Shards of about 10,000 rows in row groups of about 1,000."""
    groups = np.arange(n_rows // 1000)
    kept = 1000 + groups % 7 - 3
    return Order(groups // 10, groups % 10, kept, seed=0, n_streams=64, window_rows=8192)


def _epoch(n_rows: int) -> int:
    """Number of windows of an epoch, after iterating over all of them."""
    order = _order(n_rows)
    return sum(
        sum(1 for _ in takewhile(lambda window: window.epoch == 0, order.windows(stream, 0)))
        for stream in range(order.n_streams)
    )


def _cursors(n_rows: int) -> None:
    """Seek all streams to the middle of the epoch, as after a restart."""
    order = _order(n_rows)
    for stream in range(order.n_streams):
        next(order.windows(stream, order.stream_length(stream) // 2))


def plan(n_rows: int) -> None:
    """Print what planning an epoch's order costs, which reads neither images nor parts of the catalogue."""
    begun = time.perf_counter()
    n_windows = _epoch(n_rows)
    seconds = time.perf_counter() - begun
    peak, _ = peak_bytes(_epoch, partial(int, n_rows))
    begun = time.perf_counter()
    _cursors(n_rows)
    cursor = time.perf_counter() - begun
    console.print(
        f"Planning {n_rows:,} rows in {n_rows // 10_000:,} shards: all {n_windows:,} windows of an epoch in "
        f"{seconds:.1f} s and {peak / 1e6:.0f} MB; from nothing to the middle of it, in all 64 streams, in "
        f"{cursor:.2f} s"
    )


def main(
    n: int = 20_000,
    shards: Path = FOLDER / "shards",
    raw: Path = FOLDER / "raw",
    planned_rows: int = 2_000_000_000,
) -> None:
    threads()
    console.print(machine("cpu"))
    plan(planned_rows)
    make_shards(shards, raw, n)
    n_shards = n // PER_SHARD
    paths = [shards / f"{i:05d}.tar" for i in range(n_shards)]
    size = sum(path.stat().st_size for path in paths) / n
    console.print(f"{n:,} JPEGs of 512 pixels, quality 90: {size:,.0f} bytes each with caption and headers")

    def first_shards(count: int) -> str:
        return f"{shards}/{{00000..{count // PER_SHARD - 1:05d}}}.tar"

    work = shards.parent / f"work-{os.getpid()}"
    work.mkdir(parents=True)
    half = n // 2 // PER_SHARD * PER_SHARD
    full = {name: measured(name, first_shards(n), n, work) for name in CONTESTANTS}
    at_half = measured("with_jest", first_shards(half), half, work)
    base = full["with_open_clip"]
    table(
        "Delivered to one learner on this machine (224 pixels, 77 tokens)",
        ["", "examples/s", "of open_clip", "CPU ms an example", "peak MB"],
        [
            [
                name,
                f"{full[name]['per_second']:.0f}",
                f"{full[name]['per_second'] / base['per_second']:.2f}",
                f"{full[name]['cpu_ms']:.2f}",
                f"{full[name]['peak'] / 1e6:.0f}",
            ]
            for name in ("with_open_clip", "with_data_loader", "with_jest", "with_jest_simplejpeg")
        ],
    )
    eager, late = full["jest_eager"], full["jest_late"]
    console.print(
        f"f = 0.8, CPU ms per trained example: eager {eager['cpu_ms']:.1f}, late {late['cpu_ms']:.1f} "
        f"({late['cpu_ms'] / eager['cpu_ms']:.2f} of it); trained examples/s {eager['per_second']:.0f} and "
        f"{late['per_second']:.0f}"
    )
    console.print(
        f"Peak memory of with_jest: {at_half['peak'] / 1e6:.0f} MB at {half:,} examples, "
        f"{full['with_jest']['peak'] / 1e6:.0f} MB at {n:,}"
    )


if __name__ == "__main__":
    typer.run(main)
