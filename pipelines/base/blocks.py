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
    """A column of k fixed-size lists -> (k, width) array."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


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
