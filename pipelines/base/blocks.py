"""Arrays as columns of Arrow blocks, which is how they travel through Ray's object store without copies."""

from collections.abc import Iterator
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


def tell(block: pa.Table, values: dict[str, float]) -> pa.Table:
    """Columns that say one thing of a whole block."""
    for name, value in values.items():
        block = block.append_column(name, pa.array(np.full(len(block), value)))
    return block


def runs(table: pa.Table, column: str) -> Iterator[pa.Table]:
    """The parts of a table in which this column, of numbers, has one value: Ray Data joins what one task makes."""
    values = table[column].to_numpy()
    for start, stop in pairwise([0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(table)]):
        yield table.slice(start, stop - start)
