"""Rows of shards -> examples: what tasks that read do, anywhere on the cluster.

These tasks are most of a run's processes. Nothing here imports PyTorch, which would be most of their start and memory;
only a tokenizer that is not CLIP's does.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from jest_core import run_file, tables
from jest_core.examples.inputs import Inputs
from jest_core.run_file import Run
from pipelines.base import blocks, storage
from pipelines.data.catalogue import held_catalogue
from pipelines.data.shards import Shard


def decoded(table: pa.Table, takes: Inputs) -> pa.Table:
    """Encoded rows with status, pixels and tokens."""
    pixels, status = takes.view.batch(table["image"].to_pylist())
    tokens = takes.tokenizer(table["caption"].to_pylist())
    return (
        table.append_column(tables.EXAMPLE.field("status"), pa.array(status))
        .append_column("pixels", blocks.pack(pixels))
        .append_column("tokens", blocks.pack(tokens))
    )


def encoded(
    shard: Shard,
    number: int,
    row_group: int,
    rows: NDArray[np.int64],
    uids: Sequence[str],
    occurrences: NDArray[np.int64],
) -> pa.Table:
    """Some rows of a row group of shard `number`, in the columns of tables.EXAMPLE but status.

    uids: of the whole row group.
    """
    captions, images = shard.captions(row_group), shard.images(row_group)
    high, low = tables.uid_from_hex([uids[i] for i in rows])
    picked = images.take(pa.array(rows))
    values: dict[str, Any] = {
        "uid_high": high,
        "uid_low": low,
        "occurrence": occurrences,
        "shard": np.full(len(rows), number),
        "row": rows + sum(shard.row_group_sizes[:row_group]),
        "image": picked,
        "caption": [captions[i] for i in rows],
        "content": [_content(data) for data in picked.to_pylist()],
    }
    without_status = pa.schema([field for field in tables.EXAMPLE if field.name != "status"])
    return pa.table(values).cast(without_status)


def _content(image: bytes | None) -> int:
    """A 64-bit hash of an image's bytes, signed."""
    return int.from_bytes(hashlib.blake2b(image or b"", digest_size=8).digest(), "little", signed=True)


def of_row_group(
    batch: dict[str, np.ndarray], units: Any, run_text: str, takes: Inputs, block_size: int
) -> Iterator[pa.Table]:
    """One row group -> blocks of its kept rows, decoded and tokenised, with how long that took.

    units: a reference to shard, row group and first row (n, 3) of each unit, of which the batch names one.
    """
    run = run_file.load(run_text)
    unit = int(batch["id"][0])
    shard, row_group, first_row = ray.get(units)[unit].tolist()
    started = time.perf_counter()
    rows, uids, captions, images = kept(run, shard, row_group)
    read_seconds = time.perf_counter() - started
    for start in range(0, len(rows), block_size):
        part = slice(start, start + block_size)
        started = time.perf_counter()
        pixels, status = takes.view.batch(images.slice(start, block_size).to_pylist())
        tokens = takes.tokenizer(captions[part])
        block = pa.table(
            {
                "row": pa.array(rows[part] + first_row, pa.int32()),
                "uid": uids[part],
                "status": tables.status_labels(status),
                "caption": captions[part],
                "pixels": blocks.pack(pixels),
                "tokens": blocks.pack(tokens),
            }
        )
        told = {
            "unit": unit,
            "unit_rows": len(rows),
            "shard": shard,
            "read": read_seconds if start == 0 else 0.0,
            "decode": time.perf_counter() - started,
        }
        yield blocks.tell(block, told)


@storage.retried
def kept(run: Run, shard: int, row_group: int) -> tuple[NDArray[np.int64], list[str], list[str], pa.Array]:
    """The kept rows of a row group: their numbers in it, uids, captions, and encoded images."""
    place = held_catalogue(run.path(run.data.catalogue)).place(shard)
    opened = place.open(run.data.columns)
    uids, multiplicity = place.aligned(opened, row_group)
    rows, captions = np.flatnonzero(multiplicity > 0), opened.captions(row_group)
    images = opened.images(row_group).take(pa.array(rows))
    return rows, [uids[i] for i in rows], [captions[i] for i in rows], images
