"""Parquet shards: as img2dataset writes them, with Hugging Face's image struct, or with several texts for a picture, as
WebLI has them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..base import storage
from ..base.integrity import ParquetFile, naming
from .local_cache import LocalCache
from .pages import Pages, write_index
from .shards import WHOLE_BYTES, Shard

_BATCH_BYTES = 16 << 20  # of pictures that are decoded at once, of a row group that is read in order
_BUFFER_BYTES = 8 << 20  # of a file that are read at once then


class ParquetShard(Shard):
    """One Parquet file; its row groups are the shard's, or with an index the groups of pages.py.

    index: the path of an index that pages.write_index has made. cache: where bytes of the file are kept.
    """

    def __init__(
        self, path: str, columns: Mapping[str, str], index: str | None = None, cache: LocalCache | None = None
    ) -> None:
        super().__init__(path, columns)
        self.cache = cache
        self.source = self._opened()
        self.file = ParquetFile(path, self.source)
        self.names = set(self.file.schema_arrow.names)
        self.pages = None if index is None else Pages(self.file, self.source, index)
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.row_group_sizes = sizes if self.pages is None else [g.end - g.first for g in self.pages.groups]
        self._whole: tuple[int, pa.Array] | None = None  # the row group that was last read whole, and its pictures
        self._reader: _Reader | None = None

    def _opened(self) -> BinaryIO:
        return storage.open_file(self.path) if self.cache is None else cast(BinaryIO, self.cache.open(self.path))

    def table(self, row_group: int, columns: list[str]) -> pa.Table:
        if self.pages is None:
            return self.file.read_row_group(row_group, columns=columns)
        return self.pages.table(row_group, columns)

    def write_index(self, index: str) -> bool:
        """Write the index that reads its large row groups in parts; False where it needs none, or can have none."""
        return write_index(self.file, self.source, self.actual("image"), index)

    def images(self, row_group: int, rows: NDArray[np.int64] | None = None) -> pa.Array:
        """A row group of more than WHOLE_BYTES of pictures is read in order, and only the rows asked for are kept; the
        next call goes on from there, if its rows come later."""
        size = self.image_bytes(row_group)
        if size > WHOLE_BYTES and self.pages is None:
            return self._read_in_order(row_group, rows, size)
        if self._whole is None or self._whole[0] != row_group:
            self._whole = row_group, self._pictures(self._image_column(row_group))
        images = self._whole[1]
        if rows is None:
            return images
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool(np.all(np.diff(rows) == 1)):
            return images.slice(int(rows[0]), len(rows))  # without a copy
        return images.take(pa.array(rows))

    def _image_column(self, row_group: int) -> pa.ChunkedArray:
        """All pictures of a row group; with an index without the fields beside them, which have other pages."""
        name = self.actual("image")
        if self.pages is None or name is None or not pa.types.is_struct(self.file.schema_arrow.field(name).type):
            return self.read(row_group, "image")
        return self.pages.table(row_group, [f"{name}.bytes"])[name]

    def _read_in_order(self, row_group: int, rows: NDArray[np.int64] | None, size: int) -> pa.Array:
        n = self.row_group_sizes[row_group]
        wanted, back = np.unique(np.arange(n) if rows is None else rows, return_inverse=True)
        if not len(wanted):
            return pa.array([], pa.large_binary())
        reader, self._reader = self._reader, None  # after an error, another try starts again
        if reader is None or reader.row_group != row_group or reader.first > wanted[0]:
            reader = _Reader(row_group, self._batches(row_group, max(1, n * _BATCH_BYTES // size)))
        kept = []
        with naming(f"{self.path}, row group {row_group},"):
            while True:
                last = reader.first + len(reader.images)
                inside = wanted[(wanted >= reader.first) & (wanted < last)]
                kept.append(reader.images.take(pa.array(inside - reader.first)))
                if wanted[-1] < last:
                    break
                reader.first, reader.images = last, next(reader.batches)
        self._reader = reader
        return pa.concat_arrays(kept).take(pa.array(back))

    def _batches(self, row_group: int, n_rows: int) -> Iterator[pa.Array]:
        """The pictures of a row group, n_rows at a time; neither the file nor the column is in memory as a whole."""
        with self._opened() as data:
            file = pq.ParquetFile(data, metadata=self.file.metadata, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            for batch in file.iter_batches(n_rows, row_groups=[row_group], columns=[self.actual("image")]):
                yield self._pictures(batch.column(0))

    def image_bytes(self, row_group: int) -> int:
        """Before compression, by the file's footer; of a group with an index as many as its share of rows."""
        if self.pages is not None:
            group = self.pages.groups[row_group]
            n_rows = self.file.metadata.row_group(group.row_group).num_rows
            return self._chunk_bytes(group.row_group) * (group.end - group.first) // max(1, n_rows)
        return self._chunk_bytes(row_group)

    def _chunk_bytes(self, row_group: int) -> int:
        name, metadata = self.actual("image"), self.file.metadata.row_group(row_group)
        chunks = (metadata.column(i) for i in range(metadata.num_columns))
        with naming(self.path):  # a damaged footer may have a column whose name is not text
            return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] == name)

    def _pictures(self, column: pa.Array | pa.ChunkedArray) -> pa.Array:
        """A column as large_binary. Raises ValueError where it does not hold bytes."""
        kind = column.type
        try:
            if pa.types.is_struct(kind):  # Hugging Face: {bytes, path}
                column = pc.struct_field(column, "bytes")
            elif pa.types.is_list(kind) and pa.types.is_uint8(kind.value_type):
                column = pa.array([None if v is None else bytes(v) for v in column.to_pylist()], pa.large_binary())
            column = column.cast(pa.large_binary())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError) as error:
            raise ValueError(
                f"{self.path}: column {self.actual('image')} holds {kind}, and pictures are bytes, or a struct with "
                f"`bytes`: name the column of pictures in data.columns, as {{image: ...}} ({error})"
            ) from error
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


@dataclass
class _Reader:
    """A row group that is read in order: the number of the current batch's first row, that batch, and those to come."""

    row_group: int
    batches: Iterator[pa.Array]
    first: int = 0

    def __post_init__(self) -> None:
        self.images: pa.Array = pa.array([], pa.large_binary())
