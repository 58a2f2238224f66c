"""Arrays as columns of Arrow blocks, which travel through Ray's object store without copies."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def pack(array: NDArray[Any]) -> pa.FixedSizeListArray:
    """(k, ...) array -> a column of k fixed-size lists."""
    width = int(np.prod(array.shape[1:]))
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(array).reshape(-1)), width)


def unpack(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """A column of k fixed-size lists, or of pack_halves -> (k, width) array."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_fixed_size_binary(column.type):
        column = halves(pa.chunked_array([column]))
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def pack_halves(array: NDArray[np.float16]) -> pa.FixedSizeBinaryArray:
    """(k, D) float16 -> a column of 2 D bytes a row, which Parquet reads at the speed of a copy."""
    buffer = pa.py_buffer(np.ascontiguousarray(array, "<f2"))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * array.shape[1]), len(array), [None, buffer])


def halves(column: pa.ChunkedArray) -> pa.FixedSizeListArray:
    """A column of pack_halves, or of lists of D float16 -> those lists; copies nothing of a column of one chunk."""
    array: pa.Array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if not pa.types.is_fixed_size_binary(array.type):
        return array
    size = array.type.byte_width
    data = array.buffers()[1].slice(array.offset * size, len(array) * size)
    return pa.FixedSizeListArray.from_arrays(
        pa.Array.from_buffers(pa.float16(), len(array) * size // 2, [None, data]), size // 2
    )


def append_constants(block: pa.Table, values: Mapping[str, object]) -> pa.Table:
    """The block with a column for each value (a number), the same in all rows."""
    for name, value in values.items():
        block = block.append_column(name, pa.array(np.full(len(block), value)))
    return block


def runs(table: pa.Table, column: str) -> Iterator[pa.Table]:
    """Consecutive rows with the same number in this column, as one table each: Ray Data may join blocks of several
    tasks."""
    values = table[column].to_numpy()
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(table)]):
        yield table.slice(start, stop - start)
