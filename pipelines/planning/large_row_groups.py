"""Row groups with far more rows than a window: what reading them costs, and the remedy."""

import numpy as np

from ..data.catalogue import Catalogue
from ..data.tar_index import GROUP_ROWS

_LARGE = 4  # times the rows of a window, or of a group of a tar


def advice(catalogue: Catalogue, window_rows: int) -> str:
    """In a sentence; "" where the catalogue has no such row group. window_rows: data.window_rows of the run.

    A window has whole row groups, so each of these is read, and in memory, as a whole.
    """
    rows, limit = catalogue.row_groups["rows"].to_numpy(), _LARGE * max(window_rows, GROUP_ROWS)
    large = np.flatnonzero(rows > limit)
    if not len(large):
        return ""
    most = int(large[np.argmax(rows[large])])
    number = catalogue.row_groups["shard"][most].as_py()
    shard = {name: catalogue.shards[name][number].as_py() for name in ("path", "bytes", "rows")}
    n_bytes = shard["bytes"] * int(rows[most]) // max(1, shard["rows"])
    return (
        f"{len(large):,} row groups have more than {limit:,} rows: a window of {shard['path']} has {rows[most]:,} "
        f"rows, {n_bytes / 1e6:,.0f} MB, and data.window_rows is {window_rows:,}. A catalogue of an earlier version: "
        "run `jest catalogue` into a new directory, after which pictures are read by the pages of the file. Else "
        "(pictures as lists, or pages as large): write the shards with smaller row groups"
    )
