"""The rule `duplicate`: of kept rows with one key in all shards, only the first is kept.

Tasks of Ray Data group the keys of all parts, find the rows that repeat an earlier one, and write their parts again.
"""

import json
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..base import cluster, owner, progress, storage
from . import catalogue_parts
from .catalogue_parts import Description
from .shards import part_name

_BUCKETS = 64  # tasks that look for duplicates, each among its share of the keys


class _Item(TypedDict):
    """A row of Ray Data: the number of a shard, and the path of its part."""

    number: int
    part: str


class _Key(TypedDict):
    """A kept row's key; bucket: which task compares it. row: of the shard."""

    bucket: int
    key: bytes
    shard: int
    row: int


def drop(directory: str, n_shards: int) -> Iterator[tuple[int, Description]]:
    """Drop all but the first row of each key, in the order of the shards; returns the number of each shard whose part
    changed, and what that says now.

    directory: of a catalogue whose parts have the column `duplicate_key`.
    """
    import ray.data

    cluster.data_context()  # without a limit of CPUs: the actors that group rows have to run all at once
    items: list[_Item] = [{"number": i, "part": f"{directory}/parts/{part_name(i)}"} for i in range(n_shards)]
    n_buckets = min(_BUCKETS, len(items))
    keys = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).flat_map(
        _kept_keys  # type: ignore[arg-type]  # rows are typed here
    )
    repeats = keys.groupby("bucket", num_partitions=n_buckets).map_groups(_repeats, batch_format="pyarrow")
    changed = repeats.groupby("shard", num_partitions=n_buckets).map_groups(
        partial(owner.carried(_drop), directory=directory), batch_format="pyarrow"
    )
    others: list[tuple[int, int, int]] = []
    for row in changed.iter_rows():
        yield row["shard"], json.loads(row["description"])
        others += [(row["shard"], row["first_other"], row["n_others"])] if row["n_others"] else []
    if others:
        shard, first, _ = min(others)
        progress.warn(
            "catalogue",
            f"{sum(n for *_, n in others):,} rows have the uid of another row, but another caption or URL, such as row "
            f"{first} of shard {shard}: they are no duplicates, and kept; other columns in `by` of the rule drop them",
        )


def _kept_keys(item: _Item) -> list[_Key]:
    keys = storage.open_parquet(item["part"]).read(columns=["duplicate_key"])["duplicate_key"].to_pylist()
    return [
        {"bucket": key[0] % _BUCKETS, "key": key, "shard": item["number"], "row": row}
        for row, key in enumerate(keys)
        if key is not None
    ]


def _repeats(bucket: pa.Table) -> pa.Table:
    """The rows of a bucket whose first 128 bits of key an earlier row has. same: whether it has all of the key."""
    ordered = bucket.sort_by([("key", "ascending"), ("shard", "ascending"), ("row", "ascending")])
    keys = ordered["key"].to_pylist()
    again = [False, *(key[:16] == before[:16] for before, key in pairwise(keys))]
    # an earlier version wrote keys of 128 bits
    same = [False, *(key[: len(before)] == before for before, key in pairwise(keys))]
    return ordered.select(["shard", "row"]).append_column("same", pa.array(same)).filter(pa.array(again))


def _drop(repeats: pa.Table, directory: str) -> pa.Table:
    """Write a shard's part again, with its repeats dropped; those that are not the same are counted."""
    number = repeats["shard"][0].as_py()
    others = repeats.filter(pc.invert(repeats["same"]))["row"]
    repeats = repeats.filter(repeats["same"])
    path = f"{directory}/parts/{part_name(number)}"
    old = catalogue_parts.describe(path)
    table = storage.open_parquet(path).read()
    repeated = np.isin(np.arange(len(table)), repeats["row"].to_numpy())
    columns = {
        "dropped_by": pa.array(np.where(repeated, "duplicate", table["dropped_by"].to_numpy()), pa.string()),
        "multiplicity": pa.array(np.where(repeated, 0, table["multiplicity"].to_numpy()).astype(np.int32)),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    starts = np.cumsum([0, *old["group_rows"]]).tolist()
    groups = [table.slice(start, size) for start, size in zip(starts, old["group_rows"], strict=False)]
    is_paged = old.get("is_paged", False)
    description = catalogue_parts.write(
        path, groups, old["group_rows"], old["bytes"], old.get("notes"), old.get("named"), is_paged
    )
    return pa.table(
        {
            "shard": [number],
            "description": [json.dumps(description)],
            "n_others": [len(others)],
            "first_other": pa.array([pc.min(others).as_py()], pa.int64()),
        }
    )
