"""Row groups that are far larger than a window are named, with the cost and the remedy."""

from pathlib import Path

import pyarrow as pa

from jest_core import tables
from pipelines.base import storage
from pipelines.data.catalogue import open_catalogue
from pipelines.planning import large_row_groups
from tests.benchmarks import bench_catalogue


def test_large_row_groups_are_named_with_what_a_window_reads(tmp_path: Path):
    bench_catalogue.make(tmp_path, 3)
    directory = str(tmp_path / "catalogue")
    assert large_row_groups.advice(open_catalogue(directory), 1) == ""
    groups = open_catalogue(directory).row_groups.to_pylist()
    groups[25]["rows"] = 10_000  # of the third shard, which has 10,000 rows and 200 MB
    path = f"{directory}/row_groups.parquet"
    storage.write_table(path, pa.Table.from_pylist(groups, tables.ROW_GROUPS))
    advice = large_row_groups.advice(open_catalogue(directory), 1024)
    assert "1 row groups have more than 4,096 rows" in advice
    assert "000002.tar has 10,000 rows, 200 MB, and data.window_rows is 1,024" in advice
    assert large_row_groups.advice(open_catalogue(directory), 4_000) == ""
