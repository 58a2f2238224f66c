"""Thresholds of scores: an exact quantile of a score cache's column, over any number of parts."""

from collections.abc import Sequence
from functools import partial
from math import ceil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jest_core.tables import SlotStatus

from ..base import storage

_HALF = 1 << 16


def thresholds(directory: str, column: str, keep_shares: Sequence[float]) -> list[float]:
    """For each share, the least score among the best ceil(share * n) of n scored rows: `at_least` of the rule `score`.

    Two passes over one column: the first counts how often each upper half of a float32's bits occurs, the second counts
    the lower halves of values whose upper half is where a share ends. Takes 512 KiB for the counts of each share.
    Raises ValueError where nothing was scored.
    """
    upper = _count(directory, column, [])[0]
    if not upper.any():
        raise ValueError(
            f"{directory} scored no pair, so {column} has no best share: score a catalogue that keeps rows"
        )
    reached = [_reach(upper, ceil(share * upper.sum())) for share in keep_shares]
    highs = sorted({high for high, _ in reached})
    lower = _count(directory, column, highs)
    keys = [high << 16 | _reach(lower[highs.index(high)], rank)[0] for high, rank in reached]
    return [float(value) for value in _from_key(np.array(keys, dtype=np.uint32))]


def _reach(counts: NDArray[np.int64], n: int) -> tuple[int, int]:
    """The bin of the n-th largest value, and its rank within that bin."""
    from_top = np.cumsum(counts[::-1])
    i = int(np.searchsorted(from_top, n))
    return len(counts) - 1 - i, n - int(from_top[i] - counts[::-1][i])


def _count(directory: str, column: str, highs: list[int]) -> NDArray[np.int64]:
    """How often each lower half occurs with each of these upper halves (len(highs), 65536); without any, how often each
    upper half occurs (1, 65536)."""
    import ray.data

    parts = storage.names(f"{directory}/parts", ".parquet")
    stage = ray.data.from_items(parts, override_num_blocks=min(len(parts), 200)).map_batches(
        partial(_histograms, directory=directory, column=column, highs=highs), batch_size=None, batch_format="pyarrow"
    )
    total = np.zeros((max(1, len(highs)), _HALF), dtype=np.int64)
    for row in stage.iter_rows():
        total += np.reshape(row["counts"], total.shape)
    return total


def _histograms(batch: pa.Table, directory: str, column: str, highs: list[int]) -> pa.Table:
    counts = np.zeros((max(1, len(highs)), _HALF), dtype=np.int64)
    for name in batch["item"].to_pylist():
        keys = _keys(f"{directory}/parts/{name}", column)
        upper, lower = keys >> np.uint32(16), keys & np.uint32(_HALF - 1)
        halves = [lower[upper == high] for high in highs] if highs else [upper]
        counts += np.stack([np.bincount(half, minlength=_HALF) for half in halves])
    return pa.table({"counts": pa.array([counts.ravel()])})


@storage.retried
def _keys(part: str, column: str) -> NDArray[np.uint32]:
    """The values of scored rows as integers of the same order, without NaN."""
    file = storage.open_parquet(part)
    if column not in file.schema_arrow.names:
        raise ValueError(f"{part} has no column {column!r}; a score cache's are {', '.join(file.schema_arrow.names)}")
    rows = file.read(columns=["status", column])
    values = rows.filter(pc.equal(rows["status"], SlotStatus.OK.label))[column].to_numpy().astype(np.float32)
    return _to_key(values[~np.isnan(values)])


def _to_key(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    """float32 -> uint32 of the same order."""
    bits = (values + np.float32(0)).view(np.uint32)  # turns -0 into 0
    flipped: NDArray[np.uint32] = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return flipped


def _from_key(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    bits: NDArray[np.uint32] = np.where(keys >> 31, keys & np.uint32((1 << 31) - 1), ~keys)
    return bits.view(np.float32)
