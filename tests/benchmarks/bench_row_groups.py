"""A window of about 1,000 rows of a large row group of Parquet: bytes read, seconds and memory, wherever it is.

python -m tests.benchmarks.bench_row_groups [--rows 122880] [--shards FOLDER] [--raw FOLDER]

The pictures are JPEGs of 256 pixels, of the drawings of bench_data, over and over; each case is a process of its own.
`in order` is pyarrow's reader of a row group in order, up to the window; `whole` reads the column of pictures at once.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from PIL import Image

from pipelines.data import layouts
from pipelines.data.shards import derive_uid
from tests.benchmarks.contestants import FOLDER, make_shards
from tests.benchmarks.measure import console, machine, resident_bytes, table

DISTINCT = 500
WINDOW = 1024


def pictures(folder: Path, raw: Path) -> list[bytes]:
    """JPEGs of 256 pixels, quality 95."""
    make_shards(folder, raw, DISTINCT)
    out = []
    with tarfile.open(min(folder.glob("*.tar"))) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                sink = io.BytesIO()
                Image.open(file).resize((256, 256)).save(sink, "JPEG", quality=95)
                out.append(sink.getvalue())
    return out


def write(path: Path, n: int, images: list[bytes]) -> None:
    """One row group, as pyarrow writes it by itself."""
    order = np.random.default_rng(0).integers(len(images), size=n)

    column = [pa.array([images[i] for i in order[k : k + 10_000]], pa.binary()) for k in range(0, n, 10_000)]
    captions = [f"a drawing with the number {i}" for i in range(n)]
    urls = [f"https://example.com/{i}.jpg" for i in range(n)]
    whole = pa.table({"jpg": pa.chunked_array(column), "caption": captions, "url": urls})
    pq.write_table(whole, path, row_group_size=n)


def read(path: str, index: str, how: str, at: float) -> dict[str, float]:
    """One window in this process; `at` is its place in the row group."""
    process = psutil.Process()
    warm = layouts.open_shard(path, {}, index)
    n = sum(warm.row_group_sizes)
    del warm
    before, begun, cpu = process.io_counters().read_chars, time.perf_counter(), time.process_time()
    memory = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size
    first = min(int(at * n), n - WINDOW)
    if how == "in parts":
        shard = layouts.open_shard(path, {}, index)
        group = min(int(at * len(shard.row_group_sizes)), len(shard.row_group_sizes) - 1)
        uids, images = shard.uids(group), shard.images(group)
        first = sum(shard.row_group_sizes[:group])
    elif how == "in order":
        shard = layouts.open_shard(path, {})
        uids, images = shard.uids(0), shard.images(0, np.arange(first, first + WINDOW))
    else:
        shard = layouts.open_shard(path, {})
        uids, images = shard.uids(0), shard.read(0, "image")
    assert uids[0 if how == "in parts" else first] == derive_uid(
        f"https://example.com/{first}.jpg", f"a drawing with the number {first}"
    )
    return {
        "bytes": process.io_counters().read_chars - before,
        "seconds": time.perf_counter() - begun,
        "cpu": time.process_time() - cpu,
        "memory": resident_bytes("VmHWM") - memory,
        "pictures": len(images),
    }


def main(rows: int = 122_880, shards: Path = FOLDER, raw: Path = FOLDER / "raw") -> None:
    console.print(machine("cpu"))
    images = pictures(shards, raw)
    with tempfile.TemporaryDirectory() as work:
        path, index = f"{work}/a.parquet", f"{work}/index"
        write(Path(path), rows, images)
        begun = time.perf_counter()
        assert layouts.write_index(path, {}, index)
        console.print(
            f"{rows:,} pictures of {np.mean([len(i) for i in images]) / 1e3:.0f} kB in one row group; its index is "
            f"made in {time.perf_counter() - begun:.2f} s and has {os.path.getsize(index):,} bytes"
        )
        results = []
        for how in ("in parts", "in order", "whole"):
            for name, at in (("first", 0.0), ("middle", 0.5), ("last", 1.0)):
                if how == "whole" and name != "middle":
                    continue
                code = (
                    "import json, sys; from tests.benchmarks.bench_row_groups import read; "
                    "path, index, how, at = sys.argv[1:]; print(json.dumps(read(path, index, how, float(at))))"
                )
                command = [sys.executable, "-c", code, path, index, how, str(at)]
                ran = subprocess.run(command, capture_output=True, text=True, check=False)
                if ran.returncode:
                    raise RuntimeError(ran.stderr)
                got = json.loads(ran.stdout)
                results.append(
                    [
                        f"{name} window, {how}",
                        f"{got['bytes'] / 1e6:,.1f}",
                        f"{got['cpu']:.2f}",
                        f"{got['memory'] / 1e6:,.0f}",
                    ]
                )
        table("A window of a large row group", ["", "MB read", "CPU seconds", "peak MB"], results)


if __name__ == "__main__":
    typer.run(main)
