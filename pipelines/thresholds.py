"""The score that the best share of a score cache reaches: an exact quantile over any number of parts."""

from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from numpy.typing import NDArray

from pipelines import storage

_HALF = 1 << 16


def threshold(directory: str, column: str, keep_share: float) -> float:
    """The least score of the best ceil(keep_share * n) of the n scored rows, for the rule `score`.

    Counts how often each upper half of a float32 occurs, then each lower half below the one where the share is reached:
    two passes over one column, 512 KiB of counts. Raises ValueError where nothing was scored.
    """
    upper = _count(directory, column, lambda keys: keys >> np.uint32(16))
    n_left = ceil(keep_share * upper.sum())
    if not n_left:
        raise ValueError(f"{directory} scored no pair: there is no best share of {column}")
    high, n_left = _reach(upper, n_left)
    lower = _count(directory, column, lambda keys: keys[keys >> 16 == high] & np.uint32(_HALF - 1))
    low, _ = _reach(lower, n_left)
    return float(_from_key(np.array([high << 16 | low], dtype=np.uint32))[0])


def _reach(counts: NDArray[np.int64], n: int) -> tuple[int, int]:
    """The bin in which the n-th largest value lies, and its rank in that bin."""
    from_top = np.cumsum(counts[::-1])
    i = int(np.searchsorted(from_top, n))
    return len(counts) - 1 - i, n - int(from_top[i] - counts[::-1][i])


def _count(directory: str, column: str, keyed: Callable[[NDArray[np.uint32]], NDArray[Any]]) -> NDArray[np.int64]:
    parts = storage.names(f"{directory}/parts", ".parquet")
    stage = ray.data.from_items(parts, override_num_blocks=min(len(parts), 200)).map_batches(
        partial(_histogram, directory=directory, column=column, keyed=keyed), batch_size=None, batch_format="pyarrow"
    )
    total = np.zeros(_HALF, dtype=np.int64)
    for row in stage.iter_rows():
        total += row["counts"]
    return total


def _histogram(batch: pa.Table, directory: str, column: str, keyed: Callable[[Any], Any]) -> pa.Table:
    counts = np.zeros(_HALF, dtype=np.int64)
    for name in batch["item"].to_pylist():
        counts += np.bincount(keyed(_keys(f"{directory}/parts/{name}", column)), minlength=_HALF)
    return pa.table({"counts": pa.array([counts.tolist()])})


@storage.retried
def _keys(part: str, column: str) -> NDArray[np.uint32]:
    """The scored rows' values as integers of the same order; NaN, which is no score, is left out."""
    file = storage.open_parquet(part)
    if column not in file.schema_arrow.names:
        raise ValueError(f"{part} has no column {column!r}; a score cache's are {', '.join(file.schema_arrow.names)}")
    rows = file.read(columns=["status", column])
    values = rows.filter(pc.equal(rows["status"], "ok"))[column].to_numpy().astype(np.float32)
    return _to_key(values[~np.isnan(values)])


def _to_key(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """float32 -> uint32 of the same order."""
    bits = (values + np.float32(0)).view(np.uint32)  # -0 becomes 0
    flipped: NDArray[np.uint32] = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return flipped


def _from_key(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    bits: NDArray[np.uint32] = np.where(keys >> 31, keys & np.uint32((1 << 31) - 1), ~keys)
    return bits.view(np.float32)
