"""Rows of shards -> examples: read, decoded and tokenised by Ray tasks anywhere on the cluster.

These tasks are most of a run's processes. Nothing here imports PyTorch, which would be most of their start-up time and
memory; only a tokenizer other than CLIP's does.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from jest_core import run_file, tables
from jest_core.examples.decode import View
from jest_core.examples.inputs import Inputs
from jest_core.examples.tokenizer import Tokenizer
from jest_core.run_file import Run

from ..base import blocks, storage
from . import local_cache
from .catalogue import held_catalogue
from .shards import WHOLE_BYTES, Shard

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class KeptRows:
    """The kept rows of a row group of a shard. rows (k,): their numbers within it."""

    rows: NDArray[np.int64]
    uids: list[str]
    captions: list[str]
    shard: Shard
    row_group: int

    @storage.retried
    def images(self, picked: NDArray[np.int64] | slice) -> list[bytes | None]:
        """The encoded images of some of them, by positions among the kept; quickest in ascending order. The first
        call reads all, unless they may have more than WHOLE_BYTES."""
        if self._all is None:
            images: list[bytes | None] = self.shard.images(self.row_group, self.rows[picked]).to_pylist()
        else:
            images = self._all.take(pa.array(np.arange(len(self.rows))[picked])).to_pylist()
        return images

    @cached_property
    def _all(self) -> pa.Array | None:
        small = self.shard.image_bytes(self.row_group) <= WHOLE_BYTES
        return self.shard.images(self.row_group, self.rows) if small else None


@lru_cache(maxsize=2)
def parsed(text: str) -> Run:
    """The run file, parsed once in a process."""
    return run_file.load(text)


class ReadReport(TypedDict):
    """What a block of rows says of how it was read, as columns with the same value in every row.

    unit: number of the row group among those that are read. unit_rows: its kept rows. shard: number in the catalogue.
    read, decode: seconds.
    """

    unit: int
    unit_rows: int
    shard: int
    read: float
    decode: float


def decoded(table: pa.Table, view: View) -> pa.Table:
    """Encoded rows with the columns status and pixels."""
    pixels, status = view.batch(table["image"].to_pylist())
    return table.append_column(tables.EXAMPLE.field("status"), pa.array(status)).append_column(
        "pixels", blocks.pack(pixels)
    )


def tokenised(table: pa.Table, tokenizer: Tokenizer) -> pa.Table:
    """Rows with the column tokens."""
    return with_tokens(table, tokenizer(table["caption"].to_pylist()))


def with_tokens(table: pa.Table, tokens: NDArray[np.integer[Any]]) -> pa.Table:
    """Rows with the column tokens, as int32: half the bytes of int64, which a learner makes of them."""
    return table.append_column("tokens", blocks.pack(tokens.astype(np.int32)))


def encoded(
    shard: Shard,
    number: int,
    row_group: int,
    rows: NDArray[np.int64],
    uids: Sequence[str],
    occurrences: NDArray[np.int64],
    by_content: bool,
) -> pa.Table:
    """Some rows of a row group of shard `number`, with the columns of tables.EXAMPLE but status.

    rows (k,): their numbers within the row group. uids: of the whole row group. occurrences (k,): how often each row
    came earlier in the stream. by_content: duplicates are masked by their pictures, so these are hashed, which takes
    longer than all else here; else `content` is 0.
    """
    captions = shard.captions(row_group)
    high, low = tables.uid_from_hex([uids[i] for i in rows])
    picked = shard.images(row_group, rows)
    values = {
        "uid_high": high,
        "uid_low": low,
        "occurrence": occurrences,
        "shard": np.full(len(rows), number),
        "row": rows + sum(shard.row_group_sizes[:row_group]),
        "image": picked,
        "caption": [captions[i] for i in rows],
        "content": [_content(data) for data in picked.to_pylist()] if by_content else np.zeros(len(rows), np.int64),
    }
    without_status = pa.schema([field for field in tables.EXAMPLE if field.name != "status"])
    return pa.table(values).cast(without_status)


def _content(image: bytes | None) -> int:
    """A 64-bit hash of an image's bytes, signed."""
    return int.from_bytes(hashlib.blake2b(image or b"", digest_size=8).digest(), "little", signed=True)


def of_row_group(
    batch: dict[str, NDArray[np.int64]],
    units: "ObjectRef[NDArray[np.int64]]",
    run_text: str,
    inputs: Inputs,
    block_size: int,
) -> Iterator[pa.Table]:
    """One row group -> blocks of its kept rows, decoded and tokenised, with the columns of ReadReport.

    batch: column `id`, the number of one unit. units (n, 3): shard, row group and first row of each unit. block_size:
    rows of a block.
    """
    run = parsed(run_text)
    unit = int(batch["id"][0])
    shard, row_group, first_row = ray.get(units)[unit].tolist()
    started = time.perf_counter()
    group = kept(run, shard, row_group)
    for start in range(0, len(group.rows), block_size):
        part = slice(start, start + block_size)
        images = group.images(part)
        read = time.perf_counter()
        pixels, status = inputs.view.batch(images)
        tokens = inputs.tokenizer(group.captions[part]).astype(np.int32)
        block = pa.table(
            {
                "row": pa.array(group.rows[part] + first_row, pa.int32()),
                "uid": group.uids[part],
                "status": tables.status_labels(status),
                "caption": group.captions[part],
                "pixels": blocks.pack(pixels),
                "tokens": blocks.pack(tokens),
            }
        )
        report: ReadReport = {
            "unit": unit,
            "unit_rows": len(group.rows),
            "shard": shard,
            "read": read - started,
            "decode": time.perf_counter() - read,
        }
        yield blocks.append_constants(block, report)
        started = time.perf_counter()


@storage.retried
def kept(run: Run, shard: int, row_group: int) -> KeptRows:
    """The kept rows of a row group of the run's catalogue; their images are read when they are asked for."""
    place = held_catalogue(run.path(run.data.catalogue)).place(shard)
    opened = place.open(run.data.columns, local_cache.of(run))
    uids, multiplicity = place.aligned(opened, row_group)
    rows, captions = np.flatnonzero(multiplicity > 0), opened.captions(row_group)
    return KeptRows(rows, [uids[i] for i in rows], [captions[i] for i in rows], opened, row_group)
