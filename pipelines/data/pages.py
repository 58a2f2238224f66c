"""The pages of large row groups of a Parquet file -> groups of some 1,000 rows, each read as a few ranges of bytes.

A column of a row group is a dictionary page, perhaps, and data pages, each with a header that gives its size. pyarrow
reads a column from its first page on, and no page index (apache/arrow issue 45284), so a row in the middle costs all
that come before it. Here `jest catalogue` follows the headers once, and a reader then gets the pages that have its rows
as if they were the column's first. A column of lists is read whole: its headers do not say how many rows they have.
"""

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..base import storage
from ..base.integrity import ParquetFile, naming
from ..base.raw_file import RawFile
from .page_headers import Page, chunk_start, pages_of, read_range
from .shards import WHOLE_BYTES
from .tar_index import GROUP_BYTES, GROUP_ROWS

INDEX = pa.schema(
    [
        ("row_group", pa.int32()),
        ("column", pa.int32()),  # number among the leaves of the file's schema
        ("first_row", pa.int64()),  # of the row group; -1 = the dictionary
        ("offset", pa.int64()),  # of the header
        ("size", pa.int64()),  # with the header
        ("uses_dictionary", pa.bool_()),
    ]
)
_GROUPS = b"jest.groups"  # in the index's Parquet metadata: JSON list of [row group, first row, end] of each group
MANY_ROWS = 2 * GROUP_ROWS  # a row group of more is large, and one of more than WHOLE_BYTES of pictures
_FILE = b"jest.file"  # also: what another file would differ in
_FAR = 1 << 62  # an end of a file that no column reaches
_BUFFER_BYTES = 1 << 14  # any size above 0 has Arrow read a column page by page


@dataclass(frozen=True)
class Group:
    """Consecutive rows of a row group of the file: first to end."""

    row_group: int
    first: int
    end: int


class Pages:
    """The groups of a Parquet file, and the pages of its large row groups, by an index.

    file, source: the Parquet file, and its raw bytes. index: its path. Raises ValueError where the file is another one.
    """

    def __init__(self, file: ParquetFile, source: BinaryIO, index: str) -> None:
        table = storage.open_parquet(index).read()
        if table.schema.metadata[_FILE] != _identity(file, source):
            raise ValueError(f"{file.path} changed since it was catalogued: run `jest catalogue` into a new directory")
        self.file, self.source = file, source
        self.groups = [Group(*numbers) for numbers in json.loads(table.schema.metadata[_GROUPS])]
        self._rows: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for row in table.to_pylist():
            self._rows[row["row_group"], row["column"]].append(row)

    def table(self, number: int, names: Sequence[str]) -> pa.Table:
        """Columns of a group, by their names in the file; of a struct also a field, as `image.bytes`."""
        group = self.groups[number]
        with naming(f"{self.file.path}, row group {group.row_group},"):
            parts = [self._column(group, name) for name in names]
        columns = [(field, column) for part in parts for field, column in zip(part.schema, part.columns, strict=True)]
        return pa.table([column for _, column in columns], schema=pa.schema([field for field, _ in columns]))

    def _column(self, group: Group, name: str) -> pa.Table:
        schema = self.file.metadata.schema
        leaves = [i for i in range(len(schema)) if (schema.column(i).path + ".").startswith(f"{name}.")]
        rows = self._rows.get((group.row_group, leaves[0])) if len(leaves) == 1 else None
        if not rows:
            whole = self.file.read_row_group(group.row_group, columns=[name])
            return whole.slice(group.first, group.end - group.first)
        pages = [row for row in rows if row["first_row"] >= 0]
        firsts = np.array([page["first_row"] for page in pages])
        low, high = np.searchsorted(firsts, [group.first, group.end - 1], "right") - 1
        wanted = pages[low : high + 1]
        data = self._bytes(wanted[0], wanted[-1])
        if any(page["uses_dictionary"] for page in wanted) and rows[0]["first_row"] < 0:
            data = self._bytes(rows[0], rows[0]) + data
        skipped = group.first - wanted[0]["first_row"]
        moved = _Moved(data, chunk_start(self.file.metadata.row_group(group.row_group).column(leaves[0])))
        options = {"metadata": self.file.metadata, "page_checksum_verification": True}
        reader = pq.ParquetFile(moved, buffer_size=_BUFFER_BYTES, pre_buffer=False, **options)
        n = skipped + group.end - group.first
        batch = next(reader.iter_batches(n, row_groups=[group.row_group], columns=[schema.column(leaves[0]).path]))
        if len(batch) < n:
            raise pa.ArrowInvalid(f"column {name} has no {n} rows in its pages from byte {wanted[0]['offset']}")
        return pa.Table.from_batches([batch]).slice(skipped)

    def _bytes(self, first: dict[str, Any], last: dict[str, Any]) -> bytes:
        """Of two pages, and of all between them."""
        return read_range(self.source, first["offset"], last["offset"] + last["size"])


class _Moved(RawFile):
    """A file that has bytes only from `start` on, as many as there are pages to read."""

    def __init__(self, data: bytes, start: int) -> None:
        super().__init__(_FAR)
        self._data, self._start = memoryview(data), start

    def range(self, start: int, stop: int) -> bytes:
        return bytes(self._data[start - self._start : stop - self._start]) if start >= self._start else b""


def write_index(file: ParquetFile, source: BinaryIO, image: str | None, index: str) -> bool:
    """Write the index of a Parquet file, if it has a large row group whose pages can be read by themselves. Returns
    whether it does.

    source: the file, as raw bytes. image: the name of its column of pictures.
    """
    metadata = file.metadata
    leaves = [i for i in range(metadata.num_columns) if not metadata.schema.column(i).max_repetition_level]
    pictures = [i for i in leaves if metadata.schema.column(i).path in (image, f"{image}.bytes")]
    if len(pictures) != 1:
        return False
    rows: list[dict[str, Any]] = []
    groups: list[Group] = []
    for number in range(metadata.num_row_groups):
        n_rows = metadata.row_group(number).num_rows
        chunk = metadata.row_group(number).column(pictures[0])
        cuts = [Group(number, 0, n_rows)]
        if n_rows > MANY_ROWS or chunk.total_uncompressed_size > WHOLE_BYTES:
            by_column = {i: pages_of(source, metadata.row_group(number).column(i), n_rows) for i in leaves}
            if by_column[pictures[0]]:
                cuts = _cut(number, by_column[pictures[0]])
                rows += [_row(number, column, page) for column, pages in by_column.items() for page in pages]
        groups += cuts
    if not rows:
        return False
    bounds = json.dumps([(group.row_group, group.first, group.end) for group in groups]).encode()
    table = pa.Table.from_pylist(rows, INDEX)
    storage.write_table(index, table.replace_schema_metadata({_GROUPS: bounds, _FILE: _identity(file, source)}))
    return True


def _identity(file: ParquetFile, source: BinaryIO) -> bytes:
    """What another file would differ in, mostly: its bytes, those of its footer, and its rows."""
    return f"{source.seek(0, io.SEEK_END)} {file.metadata.serialized_size} {file.metadata.num_rows}".encode()


def _row(row_group: int, column: int, page: Page) -> dict[str, Any]:
    named = {name: getattr(page, name) for name in ("first_row", "offset", "size", "uses_dictionary")}
    return {"row_group": row_group, "column": column, **named}


def _cut(row_group: int, pages: Sequence[Page]) -> list[Group]:
    """Groups of whole pages of pictures, of at most GROUP_ROWS rows and GROUP_BYTES, or of one larger page."""
    starts, first_byte, last = list[int](), 0, 0
    for page in (page for page in pages if page.first_row >= 0 and page.n_rows):
        last, end = page.first_row + page.n_rows, page.offset + page.size
        if not starts or last - starts[-1] > GROUP_ROWS or end - first_byte > GROUP_BYTES:
            starts.append(page.first_row)
            first_byte = page.offset
    return [Group(row_group, *bounds) for bounds in pairwise([*starts, last])]
