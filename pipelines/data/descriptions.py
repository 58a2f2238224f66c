"""What the parts of all shards of a catalogue say, and the tables that are made of it.

In columns: a web-scale catalogue has millions of row groups, and a Python object for each would take gigabytes.
"""

import sys
from collections import Counter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jest_core import tables

from ..base import storage
from .catalogue_parts import Description

_Integers = NDArray[np.int64]


class Descriptions:
    """The descriptions of the parts of n shards, which come in any order; a later one of a shard replaces the first."""

    def __init__(self, n: int) -> None:
        self.bytes, self.rows, self.is_paged = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, bool)
        self.fingerprints = [""] * n
        self._counts: list[list[tuple[str, int]]] = [[] for _ in range(n)]
        self._groups: list[tuple[_Integers, _Integers]] = [(np.empty(0, np.int64),) * 2] * n  # their rows, and slots

    def add(self, number: int, description: Description) -> None:
        """That of shard `number`."""
        self.bytes[number], self.rows[number] = description["bytes"], description["rows"]
        self.is_paged[number] = description.get("is_paged", False)
        self.fingerprints[number] = description["fingerprint"]
        self._counts[number] = [(sys.intern(name), n) for name, n in description["counts"].items()]
        groups = np.array([description["group_rows"], description["group_slots"]], np.int64)
        self._groups[number] = (groups[0], groups[1])

    def counts(self) -> Counter[str]:
        """Rows that are kept, and that each rule dropped, of all shards."""
        total: Counter[str] = Counter()
        for counts in self._counts:
            for name, n in counts:
                total[name] += n
        return total

    def write_tables(self, directory: str, paths: list[str], sources: list[int]) -> None:
        """shards.parquet and row_groups.parquet. sources: which of data.shards named each path."""
        pairs = [pair for counts in self._counts for pair in counts]
        names, numbers = [name for name, _ in pairs], [n for _, n in pairs]
        offsets = np.cumsum([0, *map(len, self._counts)]).astype(np.int32)
        shards = {
            "path": paths,
            "source": sources,
            "bytes": self.bytes,
            "rows": self.rows,
            "fingerprint": self.fingerprints,
            "counts": pa.MapArray.from_arrays(offsets, pa.array(names, pa.string()), pa.array(numbers, pa.int64())),
            "is_paged": self.is_paged,
        }
        storage.write_table(f"{directory}/shards.parquet", pa.table(shards).cast(tables.SHARDS))
        sizes = np.array([len(rows) for rows, _ in self._groups], np.int64)
        starts = np.cumsum(sizes) - sizes
        groups = {
            "shard": np.repeat(np.arange(len(sizes)), sizes),
            "row_group": np.arange(sizes.sum()) - np.repeat(starts, sizes),
            "rows": _joined([rows for rows, _ in self._groups]),
            "slots": _joined([slots for _, slots in self._groups]),
        }
        storage.write_table(f"{directory}/row_groups.parquet", pa.table(groups).cast(tables.ROW_GROUPS))


def _joined(arrays: list[_Integers]) -> _Integers:
    return np.concatenate([np.empty(0, np.int64), *arrays])
